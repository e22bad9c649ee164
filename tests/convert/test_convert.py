"""From a checkpoint to a model folder: every bit, every type, nothing half-written."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from safetensors.flax import load_file

import convert
import hf_checkpoints as hf
from convert import ConvertError, hub, importer
from core import checkpoint
from core.config import GPT2Config


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_parameter_is_the_source_bit_for_bit(tmp_path: Path, dtype: str, shards: int):
    weights = hf.tensors(dtype)
    source = hf.write(tmp_path / "source", hf.prefixed(weights), shards=shards)
    folder = checkpoint.open(convert.convert(source, out=tmp_path / "out"))
    expected = hf.as_parameters(weights)
    assert folder.tensors.keys() == expected.keys()
    assert all(hf.same_bits(folder.tensors[name], expected[name]) for name in expected)


def test_unprefixed_weights_with_masks_give_the_same_tensors(tmp_path: Path):
    weights = hf.tensors()
    plain = hf.write(tmp_path / "plain", weights | hf.masks())
    prefixed = hf.write(tmp_path / "prefixed", hf.prefixed(weights))
    ours = [
        checkpoint.open(convert.convert(s, out=tmp_path / s.name / "out"))
        for s in (plain, prefixed)
    ]
    hashes = [{n: t["sha256"] for n, t in m.manifest["tensors"].items()} for m in ours]
    assert hashes[0] == hashes[1]


def test_a_single_file_takes_the_config_beside_it(tmp_path: Path):
    source = hf.write(tmp_path / "source", hf.tensors())
    (source / "model.safetensors").rename(source / "epoch7.safetensors")
    out = convert.convert(source / "epoch7.safetensors", out=tmp_path / "out")
    assert checkpoint.open(out).config == GPT2Config.from_hf(hf.CONFIG)


def test_the_manifest_says_where_everything_is_from(tmp_path: Path):
    source = hf.write(tmp_path / "source", hf.tensors(), shards=2)
    manifest = checkpoint.open(convert.convert(source, out=tmp_path / "out")).manifest
    assert manifest["source"]["path"] == str(source)
    digests = hf.digests(source)
    assert {n: f["sha256"] for n, f in manifest["source"]["files"].items()} == {
        name: digests[name] for name in digests if name not in hf.FILES
    }
    entry = manifest["tensors"]["blocks.1.attn.out.kernel"]
    assert entry["sources"] == ["h.1.attn.c_proj.weight"]
    assert entry["layout"] == "(NH)D -> NHD"
    assert manifest["parameters"] == sum(x.size for x in hf.tensors().values())


def test_tokenizer_files_are_copied(tmp_path: Path):
    source = hf.write(tmp_path / "source", hf.tensors())
    (source / "README.md").write_text("not this one")
    out = convert.convert(source, out=tmp_path / "out")
    copied = hf.digests(out)
    assert {name: copied[name] for name in hf.FILES} == {
        name: hf.digests(source)[name] for name in hf.FILES
    }
    assert "README.md" not in copied


def test_the_same_source_gives_the_same_bytes(tmp_path: Path):
    source = hf.write(tmp_path / "source", hf.tensors())
    a, b = (hf.digests(convert.convert(source, out=tmp_path / name)) for name in "ab")
    assert a == b


def test_any_jax_program_reads_the_folder_in_two_lines(tmp_path: Path):
    out = convert.convert(hf.write(tmp_path / "source", hf.tensors()), out=tmp_path / "out")
    flat = load_file(out / "model-00001-of-00001.safetensors")
    params = traverse_util.unflatten_dict(flat, sep=".")
    ours = checkpoint.open(out).params()
    assert jax.tree.structure(params) == jax.tree.structure(ours)
    jax.tree.map(np.testing.assert_array_equal, params, ours)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_a_cast_is_numpys(tmp_path: Path, stored: str, dtype: str):
    weights = hf.tensors(stored)
    source = hf.write(tmp_path / "source", weights)
    folder = checkpoint.open(convert.convert(source, out=tmp_path / "out", dtype=dtype))
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    expected = {name: x.astype(kind) for name, x in hf.as_parameters(weights).items()}
    assert all(hf.same_bits(folder.tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("stored", "dtype", "value"),
    [("float32", "float16", 7e4), ("bfloat16", "float16", -7e4), ("float32", "bfloat16", 3.4e38)],
)
def test_a_value_beyond_the_range_stops_the_cast(
    tmp_path: Path, stored: str, dtype: str, value: float
):
    weights = hf.tensors(stored)
    weights["h.2.mlp.c_fc.bias"][3] = value
    source = hf.write(tmp_path / "source", weights)
    with pytest.raises(ConvertError, match=rf"h\.2\.mlp\.c_fc\.bias: .* does not fit in {dtype}"):
        convert.convert(source, out=tmp_path / "out", dtype=dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_overflow_in_a_later_part_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importer, "in_parts", functools.partial(checkpoint.parts, part_bytes=256))
    weights = hf.tensors()
    weights["wte.weight"][-1, -1] = 1e6
    with pytest.raises(ConvertError, match=r"wte.weight: 1e\+06 does not fit in float16"):
        convert.convert(hf.write(tmp_path / "source", weights), out=tmp_path / "m", dtype="float16")
    assert not (tmp_path / "m").exists()


def test_infinities_and_nans_of_the_source_are_kept(tmp_path: Path):
    array = np.array([np.inf, -np.inf, np.nan, 1.5], np.float32)
    np.testing.assert_array_equal(importer.cast(array, "float16", "w"), array.astype(np.float16))


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path):
    first = hf.write(tmp_path / "first", hf.tensors(seed=1))
    second = hf.write(tmp_path / "second", hf.tensors(seed=2))
    out = convert.convert(first, out=tmp_path / "out")
    before = hf.digests(out)
    with pytest.raises(ConvertError, match="exists; choose another folder or pass --overwrite"):
        convert.convert(second, out=out)
    assert hf.digests(out) == before
    convert.convert(second, out=out, overwrite=True)
    expected = hf.as_parameters(hf.tensors(seed=2))
    assert hf.same_bits(checkpoint.open(out).tensors["wte.embedding"], expected["wte.embedding"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "out", "second"]


def test_a_failed_overwrite_leaves_the_old_model(tmp_path: Path):
    out = convert.convert(hf.write(tmp_path / "good", hf.tensors()), out=tmp_path / "out")
    before = hf.digests(out)
    weights = hf.tensors()
    weights["ln_f.bias"][0] = 1e6
    with pytest.raises(ConvertError):
        convert.convert(
            hf.write(tmp_path / "bad", weights), out=out, dtype="float16", overwrite=True
        )
    assert hf.digests(out) == before


def test_overwrite_never_replaces_what_is_no_model(tmp_path: Path):
    home = convert.convert(hf.write(tmp_path / "first", hf.tensors()), out=tmp_path / "home")
    source = hf.write(home / "source", hf.tensors())
    (tmp_path / "file").write_text("precious")
    for out, message in (
        (home, "the source .* lies there"),
        (source, "is not a model folder"),
        (tmp_path / "first", "is not a model folder"),
        (tmp_path, "is not a model folder"),
        (tmp_path / "file", "is not a model folder"),
    ):
        with pytest.raises(ConvertError, match=message):
            convert.convert(source, out=out, overwrite=True)
    assert (tmp_path / "file").read_text() == "precious"
    assert (source / "model.safetensors").is_file()


def test_wrong_arguments_are_told(tmp_path: Path):
    source = hf.write(tmp_path / "source", hf.tensors())
    with pytest.raises(ConvertError, match="dtype 'fp8' is not one of keep, float32"):
        convert.convert(source, out=tmp_path / "out", dtype="fp8")
    with pytest.raises(ConvertError, match="pins a download"):
        convert.convert(source, out=tmp_path / "out", revision="main")
    with pytest.raises(ConvertError, match="neither a path here nor a model"):
        convert.convert("no such thing", out=tmp_path / "out")
    with pytest.raises(ConvertError, match=r"Not a directory|File exists"):
        convert.convert(source, out=source / "config.json" / "out")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--source=", "--out=o"], "--source is empty"),
        (["--model=gpt2", "--format=npz", "--dry_run"], "--format says what --source is"),
    ],
)
def test_flags_that_say_nothing_are_wrong_usage(tmp_path: Path, flags: list[str], line: str):
    done = hf.run("convert", *flags, cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done
    assert line in done.stderr


def test_a_loop_of_links_is_no_destination(tmp_path: Path):
    source = hf.write(tmp_path / "source", hf.tensors())
    (tmp_path / "loop").symlink_to("loop")
    for out in ("loop", "loop/out"):
        with pytest.raises(ConvertError, match="loop"):
            convert.convert(source, out=tmp_path / out)


def test_the_folder_of_a_known_name_is_used_before_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "resolve", None)  # no request can be made
    hf.write(Path("models/src/gpt2-xl"), hf.tensors())
    out = convert.convert("gpt2-xl", out=hub.default_out("gpt2-xl"))
    assert out == Path("models/gpt2-xl")
    assert checkpoint.open(out).manifest["source"]["path"] == "models/src/gpt2-xl"


@pytest.mark.parametrize("name", ["{}/source", "../../source", "models/src/../../source", "./x"])
def test_a_path_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    hf.write(tmp_path / "source", hf.tensors())
    monkeypatch.chdir(tmp_path)
    Path("models/src").mkdir(parents=True)
    with pytest.raises(ConvertError, match="neither a path here nor a model"):
        importer.plan_model(name.format(tmp_path))


def test_importing_the_package_loads_nothing_heavy():
    code = "import convert, sys; print([m for m in ('jax', 'numpy', 'huggingface_hub') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_command_lines_cannot_take_the_place_of_the_functions():
    for module in ("convert.export", "convert.verify"):
        with pytest.raises(ImportError, match="this file is its command line"):
            __import__(module)
    assert callable(convert.export)
    assert callable(convert.verify)


class TestCommandLine:
    """`python -m convert`, as scripts see it."""

    def test_converts_and_prints_the_folder(self, tmp_path: Path):
        hf.write(tmp_path / "source", hf.tensors())
        done = hf.run("convert", "--source=source", "--out=out", "--dtype=bfloat16", cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "")
        assert {x.dtype.name for x in checkpoint.open(tmp_path / "out").tensors.values()} == {
            "bfloat16"
        }

    def test_a_dry_run_prints_the_plan_and_writes_nothing(self, tmp_path: Path):
        hf.write(tmp_path / "source", hf.tensors() | hf.masks())
        done = hf.run("convert", "--source=source", "--out=out", "--dry_run", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert re.search(
            r"^model +gpt2: 5,[0-9]{3} parameters \(.*n_layer=3", done.stdout, re.MULTILINE
        )
        assert re.search(
            r"^writes +40 tensors, [0-9]{2},[0-9]{3} bytes$", done.stdout, re.MULTILINE
        )
        assert re.search(
            r"^3 x blocks\.\*\.attn\.qkv\.kernel +float32\[14, 3, 2, 7\] +2,352 bytes "
            r" <- h\.\*\.attn\.c_attn\.weight  D\(3NH\) -> D3NH$",
            done.stdout,
            re.MULTILINE,
        )
        assert "3 x h.*.attn.bias left out: causal mask buffer, not a weight" in done.stdout
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ([], "give either --model=NAME or --source=PATH"),
            (["--model=gpt2", "--source=x"], "give either"),
            (["--model=/src", "--out=y"], "--model=/src is a path"),
            (["--model=../src", "--dry_run"], "a checkpoint on disk is --source=PATH"),
            (["--model=models/src/x", "--out=y"], "--model=models/src/x is a path"),
            (["--source=x"], "--source needs --out=DIR"),
            (["--source=x", "--out=y", "--revision=z"], "--revision pins a download"),
            (["--source=x", "--out=y", "--dtype=fp8"], "dtype"),
            (["--sauce=x"], "Unknown command line flag 'sauce'"),
            (["x"], "unexpected argument 'x'"),
        ],
    )
    def test_wrong_usage_exits_2(self, tmp_path: Path, flags: list[str], message: str):
        done = hf.run("convert", *flags, cwd=tmp_path)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert message in done.stderr

    @pytest.mark.parametrize("module", ["convert", "convert.export", "convert.verify"])
    def test_help_exits_0(self, tmp_path: Path, module: str):
        done = hf.run(module, "--help", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"python -m {module} --model=" in done.stdout

    @pytest.mark.parametrize("damage", ["missing", "truncated", "shape", "key", "overflow"])
    def test_bad_input_is_one_line_exit_1_and_nothing_written(self, tmp_path: Path, damage: str):
        weights = hf.tensors()
        config = dict(hf.CONFIG)
        if damage == "shape":
            weights["wpe.weight"] = weights["wpe.weight"].T.copy()
        if damage == "key":
            config["n_embed"] = 3
        if damage == "overflow":
            weights["wpe.weight"][0] = 1e9
        source = hf.write(tmp_path / "source", weights, config=config)
        file = source / "model.safetensors"
        if damage == "missing":
            file.unlink()
        if damage == "truncated":
            file.write_bytes(file.read_bytes()[:1000])
        done = hf.run("convert", "--source=source", "--out=out", "--dtype=float16", cwd=tmp_path)
        assert {
            "missing": "no weights that are understood among",
            "truncated": "found 1000 bytes",
            "shape": "wpe.weight has shape [14, 11], expected [11, 14]",
            "key": "unknown key 'n_embed' (did you mean 'n_embd'?)",
            "overflow": "wpe.weight: 1e+09 does not fit in float16",
        }[damage] in hf.the_error(done)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


_MEASURED = """
import sys, threading, time
import convert, core.checkpoint

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

peak = before = anonymous()
converter = threading.Thread(target=convert.convert, args=["source"], kwargs=dict(out="out", dtype=sys.argv[1]))
converter.start()
while converter.is_alive():
    peak = max(peak, anonymous())
    time.sleep(0.002)
print(peak - before)
"""


@pytest.mark.parametrize(("dtype", "largest_in_memory"), [("keep", 8e6), ("bfloat16", 60e6)])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, dtype: str, largest_in_memory: float):
    config = {**hf.CONFIG, "n_embd": 256, "n_layer": 24, "n_inner": 1024, "vocab_size": 40_000}
    source = hf.write(tmp_path / "source", hf.tensors(config=config), config=config)
    size = (source / "model.safetensors").stat().st_size
    assert size > 110e6
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, dtype],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (tmp_path / "out" / "manifest.json").is_file()
    assert int(done.stdout) < largest_in_memory, f"{int(done.stdout):,} of {size:,}"
