"""GPT-2 fine-tuned on the works of Shakespeare: nanoGPT's config/finetune_shakespeare.py.

    python -m convert --model=gpt2-xl --out=models/gpt2-xl
    python -m train.prepare --dataset=shakespeare --tokenizer=models/gpt2-xl
    python -m train --config=configs/finetune_shakespeare.py
    python -m core.generate --model=out-shakespeare/model --prompt="Once more unto the breach"

1.5 billion parameters, 20 updates of 32,768 tokens at a constant learning rate: 301,966 training tokens, about two
epochs. On a smaller device --config.init_from=gpt2 (124M). The best model by validation loss is kept; the loss
rises again soon. nanoGPT reports no number for it, and it was not run here (no network for the weights); the
command is tested with a small model.
"""

from ml_collections import config_dict

from train import TrainConfig


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        TrainConfig(
            out_dir="out-shakespeare",
            eval_interval=5,
            eval_iters=40,
            wandb_project="shakespeare",
            wandb_run_name="ft",
            dataset="shakespeare",
            init_from="gpt2-xl",
            always_save_checkpoint=False,
            batch_size=1,
            gradient_accumulation_steps=32,
            max_iters=20,
            learning_rate=3e-5,
            decay_lr=False,
        ).to_dict()
    )
