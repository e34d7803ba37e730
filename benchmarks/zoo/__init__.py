"""The whole zoo: every timm and torchvision model through plan, conversion and verification."""
