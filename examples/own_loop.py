"""A converted network in a training loop of one's own: nothing but PyTorch, on scikit-learn's handwritten digits."""

import sys

import torch
from sklearn.datasets import load_digits

from spherify import spherify
from spherify.heads import criterion
from spherify.parameter_groups import parameter_groups

torch.manual_seed(0)
digits = load_digits()
images = torch.nn.functional.interpolate(torch.tensor(digits.images).float()[:, None] / 8 - 1, size=32)
labels = torch.tensor(digits.target)
train, test = torch.arange(len(labels)) % 5 != 4, torch.arange(len(labels)) % 5 == 4

model = spherify("test_resnet", operator="sigmoid", num_classes=10, seed=0)
loss_of = criterion(model)  # knows the head; with head="a-softmax" above it would bring the margin
optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.05), lr=3e-3)

for epoch in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3):
    for batch in torch.randperm(int(train.sum())).split(64):
        x, y = images[train][batch].expand(-1, 3, -1, -1), labels[train][batch]
        loss = loss_of(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = model(images[test].expand(-1, 3, -1, -1)).argmax(1) == labels[test]
    model.train()
    print(f"epoch {epoch + 1}: {100 * right.float().mean():.1f} % of {len(right)} test images")
