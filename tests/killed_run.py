"""A run to be killed, with a pause at each step: ``python killed_run.py FOLDER``; it resumes what it finds."""

import sys
import time
from pathlib import Path

from training_samples import angular_net, data_set, recipe

from spherify.data.preprocess import Preprocessing
from spherify.export.folder import save
from spherify.train.conduct import Conduct
from spherify.train.fit import fit
from spherify.train.loaders import loaders_for

PAUSE = 0.02  # seconds; 36 steps


def run(folder: Path, pause: float = 0.0) -> None:
    """A run of everything that has a state, resumed where there is one; its model goes to ``folder/model``."""
    chosen = recipe(
        epochs=6, opt="adamw", lr=1e-2, no_aug=False, train_crop_mode="pad", reprob=0.3, mixup=0.3, model_ema=True
    )
    how = Preprocessing(input_size=(1, 8, 8), mean=(0.2,), std=(0.2,))
    done = fit(
        angular_net("learnable", dropout=0.2),
        loaders_for(how, data_set(), chosen),
        chosen,
        output=folder,
        resume="auto",
        on_step=[lambda step, total: time.sleep(pause)],
        conduct=Conduct(quiet=True, checkpoint_steps=2),
    )
    save(done.model, folder / "model")


if __name__ == "__main__":
    print("begun", flush=True)
    run(Path(sys.argv[1]), PAUSE)
