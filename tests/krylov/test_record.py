"""Records and tables of several."""

import json

import numpy as np
import pytest
from scipy.sparse.linalg import aslinearoperator

from linop_hess import krylov
from tests.krylov.systems import SPD, B


def test_compare_tabulates_records_and_callables():
    done = krylov.run("cg", SPD, B)
    table = krylov.compare(
        {
            "CG": done,
            "MINRES | M": lambda: krylov.run("minres", SPD, B, M=np.linalg.inv(SPD), setup_seconds=0.25),
            "LU": lambda: krylov.direct(lambda b: np.linalg.solve(SPD, b), SPD, B, memory=12800),
        }
    )
    assert [r.name for r in table.records] == ["CG", "MINRES | M", "LU"]
    assert done.name == "cg"
    rows = table.rows()
    assert rows[0]["iterations"] == done.iterations
    assert rows[1]["setup_seconds"] == 0.25
    json.dumps(rows, allow_nan=False)
    lines = str(table).splitlines()
    assert len(lines) == 5
    where = lines[0].index("true residual") + len("true residual")
    assert all(line[where - 1] != " " and line[where] == " " for line in lines[2:])
    assert "12.5 KiB" in lines[4]
    markdown = table.to_markdown().splitlines()
    assert markdown[0].startswith("| method |")
    assert r"MINRES \| M" in markdown[3]
    assert table["LU"].memory == 12800
    with pytest.raises(KeyError, match="'CG'"):
        table["nothing"]


def test_compare_rejects_what_is_no_run():
    with pytest.raises(ValueError, match="at least one"):
        krylov.compare({})
    with pytest.raises(TypeError, match="'x'.*float"):
        krylov.compare({"x": 1.0})
    with pytest.raises(TypeError, match="'x'.*NoneType"):
        krylov.compare({"x": lambda: None})


def test_as_dict_is_json_and_complete():
    record = krylov.run("gmres", aslinearoperator(SPD), B, maxiter=3)
    plain = json.loads(json.dumps(record.as_dict(solution=True), allow_nan=False))
    assert plain["x"] == pytest.approx(record.x)
    assert plain["residuals"] == pytest.approx(record.residuals)
    assert plain["backward_error"] is None
    assert "x" not in record.as_dict()
    assert "true residual" in str(record)
