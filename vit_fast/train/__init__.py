"""Training: ``vit-fast train``, and the same as a library.

    from vit_fast import train

    result = train.train(train.Settings(data="mnist-5k", output="run", patch=7, hidden_size=128, layers=6, heads=4))
    print(result.accuracy, result.weights)

`settings` says what can be asked for, `data` what can be trained on, `loop` how it is done, `state` how it is kept.
"""

from vit_fast.train.augment import Augmentation
from vit_fast.train.data import Data, Images, Pictures, open_data
from vit_fast.train.loop import Result, build, train
from vit_fast.train.settings import Settings

__all__ = ["Augmentation", "Data", "Images", "Pictures", "Result", "Settings", "build", "open_data", "train"]
