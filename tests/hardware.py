"""What the tests run on."""

import torch

GPU = torch.cuda.is_available()
