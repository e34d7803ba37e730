"""A margin on the angle to the right class, with accelerate: ``accelerate launch accelerate_margin.py`` uses every GPU.

The model's logits have no margin and need no labels, in training as in use; the margin is in the loss, and grows.
"""

import sys

import torch
from accelerate import Accelerator

from spherify import spherify
from spherify.data.batches import batches
from spherify.data.preprocess import preprocessing_for
from spherify.data.sources import open_data
from spherify.heads import MarginSchedule, criterion
from spherify.parameter_groups import parameter_groups
from spherify.regularizers import orthogonality

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 4


def main() -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    data = open_data("digits")
    model = spherify("test_resnet", operator="cosine", head="a-softmax", margin=2, num_classes=10, seed=0)
    seen_as = preprocessing_for(model, data, from_scratch=True)
    train, test = (batches(data, seen_as, 64, split=split) for split in ("train", "test"))
    loss_of = criterion(model, schedule=MarginSchedule(base=10.0, gamma=0.5, lambda_min=1.0))
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=3e-3)

    net, optimizer, train, test = accelerator.prepare(model, optimizer, train, test)
    loss_of = loss_of.to(accelerator.device)
    for epoch in range(EPOCHS):
        net.train()
        for x, y in train:
            loss = loss_of(net(x), y) + 1e-4 * orthogonality(model)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            loss_of.step()  # the margin moves on
        net.eval()
        right = []
        with torch.no_grad():
            for x, y in test:
                answers, labels = accelerator.gather_for_metrics((net(x).argmax(1), y))
                right.append((answers == labels).float())
        percent, count = 100 * torch.cat(right).mean(), sum(map(len, right))
        share = 100 * float(loss_of.share)
        accelerator.print(f"epoch {epoch + 1}: {percent:.1f} % of {count} test images, {share:.0f} % of the margin")


if __name__ == "__main__":
    main()
