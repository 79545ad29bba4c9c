"""The kind of stage that docs/contributing.md adds, through the suite that the page sends it to."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.lq.stages.conformance import Case, StageConformance, draw, with_adjoint
from tests.test_docs import ROOT, python_blocks


@functools.cache
def kind() -> Any:
    blocks = python_blocks((ROOT / "docs" / "contributing.md").read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(blocks[0], namespace)
    exec(next(block for block in blocks if "class GainStage" in block), namespace)
    return namespace["GainStage"]


def case(K=1, n=3):
    generator = torch.Generator().manual_seed(n)
    t, z, beta = draw(generator, K, 1), draw(generator, K, n), draw(generator, K, n)
    return Case(kind()(t, z).with_adjoint(beta), with_adjoint([lambda x, v: x * v] * K, t, z, beta))


class TestGain(StageConformance):
    cases = {"one": case, "three": functools.partial(case, K=3, n=5), "wide": functools.partial(case, n=8)}
