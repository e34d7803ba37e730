"""A converted network under a name of its own in timm, trained with timm's own parts.

After ``import timm_train`` any program that calls ``timm.create_model("sphere_test_resnet")`` gets a network on angles;
timm's ``train.py`` too: copy the few lines above ``main`` to its top, and run it with ``--model sphere_test_resnet``.
"""

import sys
from typing import Any

import timm
import torch
from timm.models import register_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy
from torch import nn

from spherify import spherify
from spherify.data.batches import batches
from spherify.data.preprocess import preprocessing_for
from spherify.data.sources import open_data


@register_model
def sphere_test_resnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's ``test_resnet``, converted; all arguments of timm's builder go on to it."""
    return spherify(timm.create_model("test_resnet", pretrained=pretrained, **kwargs), operator="cosine", inplace=True)


EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 3


def main() -> None:
    torch.manual_seed(0)
    data = open_data("digits")
    model = timm.create_model("sphere_test_resnet", num_classes=10)
    seen_as = preprocessing_for(model, data, from_scratch=True)
    train, test = (batches(data, seen_as, 64, split=split) for split in ("train", "test"))

    optimizer = create_optimizer_v2(model, opt="lamb", lr=1e-2, weight_decay=0.02)
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=EPOCHS, step_on_epochs=False, updates_per_epoch=len(train)
    )
    loss_of, updates = nn.CrossEntropyLoss(label_smoothing=0.1), 0
    for epoch in range(EPOCHS):
        model.train()
        for x, y in train:
            optimizer.zero_grad()
            loss_of(model(x), y).backward()
            optimizer.step()
            updates += 1
            scheduler.step_update(updates)
        model.eval()
        top1 = AverageMeter()
        with torch.no_grad():
            for x, y in test:
                top1.update(float(accuracy(model(x), y)[0]), len(y))
        print(f"epoch {epoch + 1}: {top1.avg:.1f} % of {top1.count} test images")


if __name__ == "__main__":
    main()
