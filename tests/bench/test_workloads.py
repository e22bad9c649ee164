import dataclasses
import json
import subprocess
import sys

import pytest

from bench import shapes
from bench.shapes import GPT2_124M
from bench.workloads import FULL, SUITES, Workload
from core.config import PRESETS, GPT2Config, GptOssConfig

DECODE = next(i for i, w in enumerate(FULL) if w.kind == "decode")
EVERY = {w.name: w for suite in SUITES.values() for w in suite}


@pytest.mark.parametrize("suite", SUITES)
def test_a_name_means_one_workload(suite):
    names = [w.name for w in SUITES[suite]]
    assert len(names) == len(set(names))
    # Suites may differ in how often they look and in who takes part, never in what a name means.
    for w in SUITES[suite]:
        assert dataclasses.replace(EVERY[w.name], rounds=w.rounds, without=w.without) == w


@pytest.mark.parametrize("workload", EVERY.values(), ids=str)
def test_a_workload_fits_its_model_and_survives_json(workload: Workload):
    assert Workload.from_dict(json.loads(json.dumps(workload.to_dict()))) == workload
    tokens = workload.tokens()
    assert len(tokens) == workload.batch
    assert {len(row) for row in tokens} == {workload.length + (workload.kind == "train")}
    assert all(0 <= token < workload.shape.vocab_size for row in tokens for token in row)
    # The last token is produced and not fed.
    assert workload.length + max(workload.new_tokens - 1, 0) <= workload.shape.n_positions


def test_every_process_draws_the_same_tokens():
    code = f"from bench.workloads import FULL; print(FULL[{DECODE}].tokens())"
    other = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert json.loads(other.stdout) == FULL[DECODE].tokens()


def test_the_124m_shape_is_gpt2():
    config = GPT2Config.from_hf(GPT2_124M.hf_config())
    assert config.parameter_count == GPT2Config().parameter_count == 124_439_808


def test_the_small_shapes_have_the_sizes_in_their_names():
    counts = {
        w.shape.name: GPT2Config.from_hf(w.shape.hf_config()).parameter_count
        for w in EVERY.values()
        if isinstance(w.shape, shapes.Shape)
    }
    assert f"{counts['3.4M'] / 1e6:.1f}M" == "3.4M"
    assert f"{counts['0.8M'] / 1e6:.1f}M" == "0.8M"


def test_a_small_forward_costs_the_operations_counted_by_hand():
    # 10 tokens through 4 blocks of 12 * 256^2 weights and a head of 512 * 256, two operations each; attention:
    # 4 layers, scores and values, 55 causal pairs, 256 products and sums each.
    (phase,) = EVERY["forward-3.4M-t10"].phases()
    assert phase.flops == 10 * 2 * (4 * 12 * 256**2 + 512 * 256) + 4 * 2 * 55 * 2 * 256


def test_decode_at_batch_one_is_bound_by_reading_the_weights():
    workload = EVERY["decode-124M-b1-n32"]
    floor_s = workload.floor_s(flops_per_s=400e9, bytes_per_s=40e9)
    assert floor_s is not None
    weights_s = 32 * 494e6 / 40e9
    assert weights_s < floor_s < 1.2 * weights_s


def test_narrow_weights_are_read_in_less_time_and_multiplied_at_their_own_rate():
    floors = {
        w.precision: w.floor_s(flops_per_s=1e15, bytes_per_s=40e9)
        for w in EVERY.values()
        if w.name.startswith("decode-124M-b8-n64")
    }
    exact, half, whole = (floors[p] for p in ("float32", "bfloat16", "int8"))
    assert exact is not None
    assert half is not None
    assert whole is not None
    assert half == pytest.approx(exact / 2)
    assert exact / 4 < whole < half  # its cache is as wide as bfloat16's


def test_a_token_of_the_20b_reads_four_experts_of_each_layer():
    # Of 24 layers: 4 of 32 experts with 3 x 2880^2 weights in 17 / 32 bytes each; attention, router and head in two.
    read = shapes.GPT_OSS_20B.weight_bytes(1, "bfloat16")
    attention = 24 * 2880 * (64 * 64 + 2 * 8 * 64 + 64 * 64 + 32)
    assert read == 24 * 4 * 3 * 2880**2 * 17 / 32 + 2 * (attention + 201088 * 2880)
    assert read == pytest.approx(3.7e9, rel=0.05)
    assert shapes.GPT_OSS_20B.weight_bytes(99, "bfloat16") < shapes.nbytes(shapes.GPT_OSS_20B)


@pytest.mark.parametrize("workload", [w for w in EVERY.values() if w.requests], ids=str)
def test_served_requests_have_heavy_tails_and_as_many_tokens_as_equal_ones(workload: Workload):
    tailed, even = workload.served(), workload.served(is_even=True)
    assert len(tailed) == len(even) == workload.requests
    for requests in (tailed, even):
        assert sum(new for _, new in requests) == workload.total_tokens
        assert sum(len(p) for p, _ in requests) == workload.requests * workload.length
        assert all(len(p) + new <= workload.shape.n_positions for p, new in requests)
    news = sorted(new for _, new in tailed)
    assert news[0] >= 1
    assert news[-1] > 2.5 * workload.new_tokens
    assert news[len(news) // 2] < 0.9 * workload.new_tokens
    assert workload.prompts() == [prompt for prompt, _ in tailed]


def test_limits_that_were_not_measured_are_not_claimed():
    assert EVERY["decode-3.4M-b8-n32"].floor_s(flops_per_s=1e9, bytes_per_s=1e9) is None
    assert EVERY["open-124M"].floor_s(flops_per_s=1e9, bytes_per_s=1e9) is None


def test_tokens_per_second_counts_every_row():
    workload = EVERY["decode-124M-b8-n32"]
    assert (workload.figure(2.0), workload.unit) == (128.0, "tokens/s")
    assert EVERY["forward-124M-t64"].figure(0.25) == 250.0


def test_a_conversion_counts_the_gigabytes_that_it_reads():
    workload = EVERY["convert-XL"]
    assert workload.unit == "GB/s"
    assert workload.figure(2.0) == pytest.approx(shapes.nbytes(shapes.GPT2_XL) / 2e9)
    assert workload.output_bytes == workload.source_bytes


def test_unpacked_experts_are_written_in_their_own_size():
    workload = EVERY["convert-20B-bfloat16"]
    assert (workload.source_bytes, workload.output_bytes) == (13_761_264_768, 41_829_514_368)


def test_the_large_shapes_are_the_published_models():
    ours = GPT2Config.from_hf(shapes.GPT2_XL.hf_config())
    assert ours.tensors() == PRESETS["gpt2-xl"].tensors()
    assert ours.axes == PRESETS["gpt2-xl"].axes
    ours = GptOssConfig.from_hf(shapes.GPT_OSS_20B.hf_config())
    published = PRESETS["gpt-oss-20b"]
    assert ours == dataclasses.replace(published, eos_token_id=None, pad_token_id=None)
    # The bytes of the hub's files without their headers, and the numbers of their tensors.
    for shape, size, count in (
        (shapes.GPT2_124M, 548_090_880, 160),
        (shapes.GPT2_XL, 6_431_771_392, 628),
        (shapes.GPT_OSS_20B, 13_761_264_768, 459),
    ):
        assert shapes.nbytes(shape) == size
        assert sum(len(tensors) for tensors in shape.hf_files().values()) == count
