"""GPT-2 124M on OpenWebText, from scratch: nanoGPT's config/train_gpt2.py.

    python -m train.prepare --dataset=openwebtext --hf_dataset=Skylion007/openwebtext --tokenizer=gpt2
    python -m train --config=configs/gpt2.py

Half a million tokens an update (480 sequences of 1,024), 300 billion in all. nanoGPT reports a validation loss of
about 2.85 after 4 days on 8 A100. On 8 devices take batch_size=96 and gradient_accumulation_steps=5, the same updates.
On less memory lower batch_size and raise gradient_accumulation_steps by the same factor.
"""

from ml_collections import config_dict

from train import TrainConfig


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        TrainConfig(
            out_dir="out-gpt2",
            dataset="openwebtext",
            batch_size=12,
            block_size=1024,
            gradient_accumulation_steps=5 * 8,
            max_iters=600_000,
            lr_decay_iters=600_000,
            eval_interval=1000,
            eval_iters=200,
            log_interval=10,
            weight_decay=1e-1,
        ).to_dict()
    )
