"""`benchmarks/recovery_quality.py` on a tiny model, and how it finds where lines cross."""

import json
from pathlib import Path

import pytest

from benchmarks import recovery_quality
from benchmarks.recovery_quality import crossings, main, value_at
from tests.support.tiny_models import save_tiny


def test_lines_cross_between_points() -> None:
    falling, rising = [(1.0, 4.0), (100.0, 0.0)], [(1.0, 0.0), (10.0, 1.0), (100.0, 2.0)]
    assert value_at(falling, 10.0) == pytest.approx(2.0)
    ((seconds, value),) = crossings(falling, rising)
    # 4 - 2x = x, with x the decimal logarithm of the seconds.
    assert (seconds, value) == (pytest.approx(10 ** (4 / 3)), pytest.approx(4 / 3))
    assert crossings(falling, [(1.0, 5.0), (100.0, 1.0)]) == []
    assert crossings(falling, [(200.0, 0.0), (300.0, 9.0)]) == []


def test_every_way_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ways with one budget, two of them with another; what is measured stays measured."""
    model = save_tiny(tmp_path / "model", num_layers=6)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{i} The quick brown fox jumps over the lazy dog ." for i in range(200)))
    given = json.dumps({"path": str(text)})
    arguments = ["--model", model, "--dtype", "float32", "--layers", "4", "--data", given, "--test", given]
    arguments += ["--test-tokens", "256", "--context", "32", "--tasks", "--sequence-length", "16"]
    arguments += ["--batch-size", "4", "--micro-batch-size", "4", "--work", str(tmp_path / "work")]
    arguments += ["--set", "methods.0.scoring.max_sequences=2", "--set", "methods.0.recovery.adapter.rank=4"]
    arguments += ["--out", str(tmp_path / "out.jsonl"), "--picture", str(tmp_path / "picture.png")]
    main([*arguments, "--tokens", "256"])
    two_budgets = [*arguments, "--ways", "plain", "best", "--tokens", "512", "256"]
    main(two_budgets)
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["way"], row["budget"]) for row in rows] == [
        *((way, 256) for way in recovery_quality.WAYS),
        ("plain", 512),
        ("best", 512),
    ]
    for row in rows:
        assert row["tokens"] == row["budget"]
        assert row["seconds"]["recover"] > 0
        assert row["metrics"]["test/token_perplexity"] != row["dense"]["test/token_perplexity"]
    assert len({row["dense"]["test/token_perplexity"] for row in rows}) == 1
    assert (tmp_path / "picture.png").stat().st_size > 10_000

    monkeypatch.setattr(recovery_quality, "measure", lambda *_: pytest.fail("measured again"))
    main(two_budgets)
    assert (tmp_path / "out.jsonl").read_text().splitlines() == lines
