"""Makes the TensorFlow checkpoints beside this file, with TensorFlow itself. Once, in an environment of its own:

    uv venv --python 3.11 tf && uv pip install --python tf/bin/python tensorflow-cpu==2.21.0 ml_dtypes
    tf/bin/python tests/golden/make_tf_bundle.py

`tf_gpt2` is saved as OpenAI's code saved theirs: `tf.compat.v1.train.Saver` on the variables of its model.py. The
others are for the reader: `tf_odd` has every type, a scalar, an empty tensor and two data files; `tf_blocks` an index
of several blocks (a block is 256 KiB: names of four thousand characters fill it, and compress to nothing); `tf_slices`
a variable stored in slices, which the reader refuses.
"""

import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import tensorflow as tf  # pyright: ignore[reportMissingModuleSource]

sys.path.insert(0, str(Path(__file__).parents[1]))
import openai_checkpoints as openai

HERE = Path(__file__).parent
tf.compat.v1.disable_eager_execution()


def save(folder: Path, build, *, sharded: bool = False) -> None:
    """Saves the variables that `build` creates as `folder`/model.ckpt."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = tf.compat.v1.ConfigProto(device_count={"CPU": 2})
    with tf.Graph().as_default(), tf.compat.v1.Session(config=config) as session:
        build()
        session.run(tf.compat.v1.global_variables_initializer())
        saver = tf.compat.v1.train.Saver(sharded=sharded, save_relative_paths=True)
        saver.save(session, str(folder / "model.ckpt"), write_meta_graph=False)


def variable(name: str, value) -> None:
    tf.compat.v1.get_variable(name, initializer=tf.constant(value), use_resource=False)


def gpt2() -> None:
    for name, value in openai.tensors().items():
        variable(name, value)


def odd() -> None:
    steps = np.arange(15).reshape(5, 3)
    kinds = ("float32", "float64", "float16", "int8", "int16", "int32", "int64", "uint8", "bool")
    with tf.device("/cpu:0"):
        for kind in kinds:
            variable(f"kinds/{kind}", steps.astype(kind))
        variable("global_step", np.int64(1234567890123))
    with tf.device("/cpu:1"):
        variable("kinds/bfloat16", steps.astype(ml_dtypes.bfloat16))
        variable("empty", np.zeros((0, 3), np.float32))
        variable("name", np.array("a string"))


def blocks() -> None:
    for i in range(140):
        variable(f"{i:03d}{'x' * 4000}", np.float32(i))


def slices() -> None:
    tf.compat.v1.get_variable(
        "whole",
        shape=(4, 3),
        initializer=tf.compat.v1.ones_initializer(),
        partitioner=tf.compat.v1.fixed_size_partitioner(2),
    )


def main() -> None:
    save(HERE / "tf_gpt2", gpt2)
    (HERE / "tf_gpt2" / "hparams.json").write_text(json.dumps(openai.HPARAMS) + "\n")
    save(HERE / "tf_odd", odd, sharded=True)
    save(HERE / "tf_slices", slices)
    with tempfile.TemporaryDirectory() as scratch:
        save(Path(scratch) / "tf_blocks", blocks)
        with zipfile.ZipFile(HERE / "tf_blocks.zip", "w", zipfile.ZIP_DEFLATED) as packed:
            for file in sorted((Path(scratch) / "tf_blocks").iterdir()):
                # A name without the file's time, so that another run makes the same archive.
                packed.writestr(zipfile.ZipInfo(file.name), file.read_bytes(), zipfile.ZIP_DEFLATED)
    print(tf.__version__)


if __name__ == "__main__":
    main()
