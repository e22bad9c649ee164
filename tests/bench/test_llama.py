"""llama.cpp as it is measured: all rows of a step in one pass of its own."""

from collections.abc import Sequence
from pathlib import Path

import pytest

import convert
from bench import weights
from bench.peers import llama
from bench_contestants import TINY, workload

pytestmark = pytest.mark.parity


class Watched(llama.Llama):
    """Remembers which sequences each pass had."""

    passes: list[list[int]]

    def _decode(self, asked: Sequence[tuple[int, int]]) -> list[int]:
        self.passes.append([self.batch.seq_id[at][0] for at in range(self.batch.n_tokens)])
        return super()._decode(asked)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    convert.convert(weights.write(folder / "huggingface", TINY), out=folder / "ours", quiet=True)
    convert.export(folder / "ours", to="gguf", out=folder / "f32.gguf", type="f32", quiet=True)
    return folder / "f32.gguf"


def test_sequences_come_in_order_so_that_none_is_computed_apart(file: Path):
    """A sequence whose number does not follow on the one before begins a pass of its own, over all weights."""
    pytest.importorskip("llama_cpp")
    work = workload("serve", requests=9, batch=4)
    four = Watched(file, rows=4, length=work.longest, threads=1, is_exact=True)
    four.passes = []
    together = four.generate(work.served(), 4)
    assert four.passes
    for sequences in four.passes:
        assert sequences == sorted(sequences)
    assert len(set(four.passes[0])) == 4
    one = Watched(file, rows=1, length=work.longest, threads=1, is_exact=True)
    one.passes = []
    assert [len(row) for row in together] == [new for _, new in work.served()]
    assert one.generate(work.served(), 1) == together
    four.close()
    one.close()
