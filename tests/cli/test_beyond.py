"""Commands on programs that are more than a mask and a score: they work, or say in a sentence why not."""

import pytest

TEXT = """
pattern watched(gate: float[H]):
    mask = k <= q
    weights = w * gate[h]
    output received = sum(w, over=q)
pattern routed:
    pool means = mean(K, block=16)
    attend like:
        lengths = (Lq, cdiv(Lk, 16))
        keys = means
        output liking = s
    select chosen[Lq, cdiv(Lk, 16)] = top(liking[b, h, q, k], 2, candidates=k * 16 <= q)
    mask = chosen[b, h, q, k // 16] and k <= q
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "beyond.attn"
    path.write_text(TEXT)
    return path


def test_check_names_the_patterns(invoke, file):
    found = invoke("check", file)
    assert found.exit_code == 0 and "watched(gate: float[H])" in found.output and "routed()" in found.output


def test_run_shows_and_checks_every_result(invoke, file):
    found = invoke("run", f"{file}:watched", "--len", 32, "--heads", 2, "--backend", "eager", "--check")
    assert found.exit_code == 0, found.output
    assert "received" in found.output and "passed" in found.output


def test_what_only_a_call_knows_is_refused(invoke, file):
    for command in ("show", "bench"):
        found = invoke(command, file, "--len", 32)
        assert found.exit_code != 0 and "routed" in found.output + found.stderr
    assert "a stage of it makes" in invoke("show", file, "--len", 32).stderr
