"""One float layer of every kind that has a quantized form, with the shape of an input."""

import torch
from torch import nn

from torchquant.nn import layout


class Conv2dSame(nn.Conv2d):
    """TensorFlow's SAME padding, as timm writes it."""

    def forward(self, x):
        sides = layout.same_padding(list(x.shape[2:]), self.kernel_size, self.stride, self.dilation)
        return self._conv_forward(torch.nn.functional.pad(x, sides), self.weight, self.bias)


class StaticPadding(nn.Conv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x):
        return super().forward(self.static_padding(x))


LAYERS = {
    "linear": (nn.Linear(6, 5), (2, 3, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 3, 8, 7)),
    "grouped": (nn.Conv2d(6, 9, 3, padding=1, groups=3), (2, 6, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 6, 6)),
    "same": (nn.Conv2d(3, 4, (4, 3), padding="same"), (1, 3, 7, 6)),
    "reflect": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 6)),
    "circular": (nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 6)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=2), (1, 2, 4, 5, 6)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 4, 3)),
    "transposed_dilated": (nn.ConvTranspose2d(3, 2, (3, 2), dilation=(1, 2), padding=2), (1, 3, 6, 7)),
    "tensorflow_same": (Conv2dSame(3, 4, 3, stride=2), (2, 3, 8, 7)),
    "static_padding": (StaticPadding(3, 4, 3, stride=2), (2, 3, 8, 7)),
}
