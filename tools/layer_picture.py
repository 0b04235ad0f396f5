"""Draws what Unitization does to photographs: `python tools/layer_picture.py [--data sample_data] [--output FILE.png]`.

Held-out photographs go through a random 3x3 convolution (He, seed 0) and Unitization2d in evaluation mode, whose running statistics
come from the training photographs. Left: norm of each output against its norm at alpha = 0. Right: mean norm of the
outputs when the contrast of the photographs is multiplied by a factor after the statistics were taken.
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from unitdist import Unitization2d

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402

SIDE_PX = 64
ALPHAS = {0.0: "#4c72b0", 0.5: "#8172b3", 1.0: "#c44e52"}
CONTRASTS = (0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)


def read_photographs(folder: Path) -> Tensor:
    """All images below `folder`, (N, 3, SIDE_PX, SIDE_PX) float32, about 0 on average, in units of the full range."""
    files = sorted(folder.glob("*/*.jpg")) + sorted(folder.glob("*/*.JPEG"))
    if not files:
        raise SystemExit(
            f"no photographs in {folder}; make some: python tools/make_sample_data.py --output sample_data"
        )
    squares = []
    for file in files:
        with Image.open(file) as image:
            pixels = transforms.pil_to_tensor(image.convert("RGB"))
        square = transforms.center_crop(transforms.resize(pixels, [SIDE_PX], antialias=True), [SIDE_PX, SIDE_PX])
        squares.append(square.float() / 255 - 0.45)
    return torch.stack(squares)


@torch.no_grad()
def output_norms(convolution: nn.Module, layer: Unitization2d, images: Tensor, alpha: float) -> Tensor:
    """(N,): root of the mean square of each image's output. 1 means: as large as a normalized sample is on average."""
    layer.alpha.fill_(alpha)
    y = layer(convolution(images))
    return y.square().sum(dim=(1, 2, 3)).div(y[0].numel()).sqrt()


def build_layer(training: Tensor) -> tuple[nn.Module, Unitization2d]:
    """The convolution, and the layer with the running statistics of all training photographs."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight)
    # n = 64, the number of channels, makes s of an average sample 1 (Alg. 2: s is a sum over channels of means over pixels).
    layer = Unitization2d(64, momentum=1.0, norm_divisor=64)
    with torch.no_grad():
        layer(convolution(training))
    return convolution, layer.eval()


def draw(training: Tensor, validation: Tensor, output: Path) -> None:
    """Writes the picture."""
    convolution, layer = build_layer(training)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.4, 3.1), layout="constrained")
    plain = output_norms(convolution, layer, validation, 0.0)
    for alpha, colour in ALPHAS.items():
        name = f"alpha = {alpha:g}" + (" (batch norm)" if alpha == 0 else "")
        left.scatter(plain, output_norms(convolution, layer, validation, alpha), s=9, color=colour, label=name)
        means = [float(output_norms(convolution, layer, factor * validation, alpha).mean()) for factor in CONTRASTS]
        right.plot(CONTRASTS, means, color=colour, marker="o", markersize=3, label=name)
    left.set(
        xlabel="norm of a photograph's output, alpha = 0", ylabel="norm of its output", ylim=(0, None), xlim=(0, None)
    )
    right.set(
        xlabel="contrast of the photographs, times", ylabel="mean norm of the outputs", xscale="log", yscale="log"
    )
    right.set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"], minor=False)
    right.set_yticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"], minor=False)
    for axes in (left, right):
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("sample_data"), help="folder with train/ and val/")
    parser.add_argument("--output", type=Path, default=Path("docs/assets/layer.png"))
    arguments = parser.parse_args()
    draw(read_photographs(arguments.data / "train"), read_photographs(arguments.data / "val"), arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
