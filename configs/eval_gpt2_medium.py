"""The loss of OpenAI's gpt2-medium on OpenWebText, before any training: nanoGPT's config/eval_gpt2_medium.py.

    python -m convert --model=gpt2-medium --out=models/gpt2-medium
    python -m train.prepare --dataset=openwebtext --hf_dataset=Skylion007/openwebtext --tokenizer=models/gpt2-medium
    python -m train --config=configs/eval_gpt2_medium.py

One JSON line on stdout, nothing is written. nanoGPT's README: 2.85 on train, 2.84 on val. It computes GELU in its
erf form for these weights, which were trained with the tanh form; here a model folder says which it is, and these
say tanh. Not measured here (no network, no OpenWebText).
"""

from ml_collections import config_dict

from train import TrainConfig


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        TrainConfig(
            init_from="gpt2-medium",
            dataset="openwebtext",
            batch_size=8,
            block_size=1024,
            eval_iters=500,
            eval_only=True,
        ).to_dict()
    )
