"""The requirements that tests/lower_bounds.py pins."""

from tests.lower_bounds import lower_bounds


def test_every_requirement_has_a_lower_bound(tmp_path):
    pinned = lower_bounds()
    assert {one.split("==")[0] for one in pinned} >= {"numpy", "scipy", "torch", "pytest", "hypothesis"}
    page = tmp_path / "pyproject.toml"
    page.write_text('[project]\ndependencies = ["a-b>=1.2"]\n[project.optional-dependencies]\ntest = ["c>=3"]\n')
    assert lower_bounds(page) == ["a-b==1.2", "c==3"]
