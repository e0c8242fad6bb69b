"""Image classification.

data    digits (scikit-learn, embedded) | fashion-mnist (the system package dataset-fashion-mnist, a folder of its four
        idx files, or torchvision's download) | cifar10 (a folder of train.parquet and test.parquet in the hub's
        schema, or the hub)
model   cnn | resnet9 | airbench | resnet18: see `image_networks`
loss    cross-entropy
metric  accuracy on held-out images in percent, higher is better
"""

import gzip
import importlib.util
import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from halfstep.errors import DataError, MissingExtraError, RecipeError
from halfstep.tasks.image_networks import MODELS, PatchWhitening
from halfstep.training import Count, Metric, Positive, Share, TrainSettings

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the recipe's [options] table holds."""

    dataset: Literal["digits", "fashion-mnist", "cifar10"] = "digits"
    data: str = ""  # a folder; "" means where the data set usually is
    model: Literal["cnn", "resnet9", "airbench", "resnet18"] = "cnn"
    width: Count = 64  # channels of the first stage
    augment: bool = False  # shift by up to 2 pixels, flip left-right every other epoch
    early_size: Annotated[int, Field(ge=0)] = (
        0  # images have this many points a side in early steps, which are cheaper so
    )
    early_share: Share = 0.0  # of the steps that are early
    flip_average: bool = False  # average the prediction over the image and its mirror image
    shift_average: bool = False  # and over both shifted by a pixel, up and left, and down and right, which count half
    label_smoothing: Share = 0.0
    margin: Positive = 0.5  # percentage points


@dataclass(frozen=True)
class Images:
    """Train and held-out images, [count, channels, height, width] fp32, and labels [count] int64."""

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


def read_digits(data: str) -> Images:
    """scikit-learn's digits: 1,797 images of 8x8, every fifth held out. They come with scikit-learn, so data must be ""."""
    if data:
        raise DataError(
            f"the digits come with scikit-learn and are not read from '{data}'; leave data out, or set "
            "dataset=fashion-mnist or dataset=cifar10"
        )
    if importlib.util.find_spec("sklearn") is None:
        raise MissingExtraError("scikit-learn", "images", "the digits data set")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels, dtype=torch.int64)
    held_out = torch.arange(len(y)) % 5 == 0
    return Images(x[~held_out], y[~held_out], x[held_out], y[held_out])


def read_fashion(data: str) -> Images:
    """Fashion-MNIST: 60,000 and 10,000 images of 28x28, from idx files as upstream and Debian ship them."""
    folder = Path(data) if data else FASHION_FOLDER
    if not data and not folder.exists():
        folder = _download_fashion()

    def read(name: str, offset: int) -> Tensor:
        for path in (folder / f"{name}.gz", folder / name):
            if path.exists():
                try:
                    raw = path.read_bytes() if path.suffix != ".gz" else gzip.decompress(path.read_bytes())
                    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=offset)
                except (OSError, EOFError, zlib.error, ValueError) as error:
                    raise DataError(f"'{path}' is damaged ({error}); get it again") from None
        raise DataError(f"'{folder}' has no {name}.gz; give the folder of Fashion-MNIST's four idx files as data")

    def load(split: str) -> tuple[Tensor, Tensor]:
        x, y = read(f"{split}-images-idx3-ubyte", 16), read(f"{split}-labels-idx1-ubyte", 8).long()
        if len(x) != 784 * len(y):
            raise DataError(
                f"'{folder}': {split}-images-idx3-ubyte holds {len(x) / 784:g} images of 28x28 for {len(y)} labels; get it again"
            )
        return x.view(-1, 1, 28, 28).float() / 255, y

    return Images(*load("train"), *load("t10k"))


def _download_fashion() -> Path:
    if importlib.util.find_spec("torchvision") is None:
        raise DataError(
            "Fashion-MNIST is not on this machine; install the system package dataset-fashion-mnist, give its folder as "
            "data, or install torchvision, which downloads it"
        )
    import platformdirs
    from torchvision.datasets import FashionMNIST

    root = Path(platformdirs.user_cache_dir("halfstep")) / "data"
    FashionMNIST(str(root), download=True)
    return root / "FashionMNIST" / "raw"


def read_cifar10(data: str) -> Images:
    """CIFAR-10: 50,000 and 10,000 images of 32x32, from parquet files in the schema of uoft-cs/cifar10, or from there."""
    train, test = _find_cifar_tables(data)
    return Images(*_decode(train), *_decode(test))


def _find_cifar_tables(data: str) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    if not data:
        if importlib.util.find_spec("datasets") is None:
            raise DataError(
                "CIFAR-10 is read from a folder with train.parquet and test.parquet (give it as data), or from the hub, "
                "which needs in halfstep's checkout: pip install '.[hub]'"
            )
        from datasets import Image, load_dataset

        hub = load_dataset("uoft-cs/cifar10").cast_column("img", Image(decode=False))
        return list(hub["train"]), list(hub["test"])
    if importlib.util.find_spec("pyarrow") is None:
        raise MissingExtraError("pyarrow", "images", "reading parquet")
    import pyarrow
    import pyarrow.parquet

    tables = []
    for split in ("train", "test"):
        path = Path(data) / f"{split}.parquet"
        if not path.exists():
            raise DataError(f"there is no '{path}'; give a folder with train.parquet and test.parquet as data")
        try:
            tables.append(pyarrow.parquet.read_table(path).to_pylist())
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise DataError(f"'{path}' cannot be read as parquet: {str(error).splitlines()[0]}") from None
    return tables[0], tables[1]


def _decode(rows: list[dict[str, object]]) -> tuple[Tensor, Tensor]:
    if importlib.util.find_spec("PIL") is None:
        raise MissingExtraError("pillow", "images", "decoding images")
    from PIL import Image

    if not rows or "img" not in rows[0] or "label" not in rows[0]:
        raise DataError(f"expected columns img and label; got {', '.join(rows[0]) if rows else 'no rows'}")
    try:
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")) for row in rows])  # type: ignore[index]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"an image cannot be decoded ({error}); img holds bytes and path, as in uoft-cs/cifar10"
        ) from None
    labels = torch.tensor([row["label"] for row in rows], dtype=torch.int64)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, labels


READERS: dict[str, Callable[[str], Images]] = {
    "digits": read_digits,
    "fashion-mnist": read_fashion,
    "cifar10": read_cifar10,
}


class ImageClassification:
    """The task; see the head of this module."""

    def __init__(self, options: Options, settings: TrainSettings, device: str = "cpu") -> None:
        self.options, self.settings, self.device = options, settings, device
        self.metric = Metric(name="accuracy", unit="%", higher_is_better=True, margin=options.margin)
        images = READERS[options.dataset](options.data)
        if not len(images.train) or not len(images.held_out):
            raise DataError(f"'{options.data}' holds no images to train on or none held out")
        mean = images.train.mean((0, 2, 3), keepdim=True)
        std = images.train.std((0, 2, 3), keepdim=True)
        self.images = Images(
            (images.train - mean) / std, images.train_labels, (images.held_out - mean) / std, images.held_out_labels
        )

    def build_model(self) -> nn.Module:
        torch.manual_seed(self.settings.seed)
        _, channels, size, _ = self.images.train.shape
        classes = int(self.images.train_labels.max()) + 1
        model = MODELS[self.options.model](channels, size, classes, self.options.width)
        for module in model.modules():
            if isinstance(module, PatchWhitening):
                module.fit(self.images.train[:5000])
        self._require_fitting(model)
        return model.to(self.device)

    @torch.no_grad()
    def _require_fitting(self, model: nn.Module) -> None:
        """Raises DataError or RecipeError where the model does not take the images in the sizes that it will see."""
        model.eval()
        image, name = self.images.train[:1], self.options.model
        try:
            model(image)
        except RuntimeError:
            size = "x".join(map(str, image.shape[2:]))
            raise DataError(
                f"model {name} does not take images of {size} points; give square ones, or another model"
            ) from None
        if self.options.early_size and self.options.early_share:
            try:
                model(self._shrink(image))
            except RuntimeError:
                raise RecipeError(
                    f"model {name} does not take images of early_size={self.options.early_size} points; leave it out, give a "
                    "larger one, or a model that averages over places, such as resnet18"
                ) from None
        model.train()

    def _shrink(self, images: Tensor) -> Tensor:
        return F.interpolate(images, size=(self.options.early_size,) * 2, mode="bilinear", antialias=True)

    def make_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images and labels of a step: a slice of its epoch's shuffle, augmented by noise of seed and step alone."""
        size, count = self.settings.batch_size, len(self.images.train)
        per_epoch = max(1, count // size)
        epoch, place = divmod(step - 1, per_epoch)
        noise = torch.Generator().manual_seed(-1 - self.settings.seed * 1_000_003 - epoch)
        chosen = torch.randperm(count, generator=noise)[place * size : (place + 1) * size]
        x, y = self.images.train[chosen], self.images.train_labels[chosen]
        if self.options.augment:
            # mirrored in every other epoch, so that both versions of an image are seen equally often: Jordan 2024, section 3.6
            first = torch.rand(count, generator=torch.Generator().manual_seed(-1 - self.settings.seed)) < 0.5
            mirrored = first[chosen] ^ bool(epoch % 2)
            x = augment(x, mirrored, torch.Generator().manual_seed(self.settings.seed * 1_000_003 + step))
        if self.options.early_size and step <= self.options.early_share * self.settings.steps:
            x = self._shrink(x)
        return x.to(self.device), y.to(self.device)

    def measure_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(model(inputs), labels, label_smoothing=self.options.label_smoothing)

    def evaluate(self, model: nn.Module) -> float:
        right = 0
        for x, y in zip(self.images.held_out.split(500), self.images.held_out_labels.split(500), strict=True):
            x, y = x.to(self.device), y.to(self.device)
            scores = sum(share * model(view).float().softmax(1) for view, share in self._look(x))
            right += int((scores.argmax(1) == y).sum())
        return 100 * right / len(self.images.held_out)

    def _look(self, x: Tensor) -> Iterator[tuple[Tensor, float]]:
        """The views of a batch that a prediction is averaged over, each with its weight."""
        views = [(x, 1.0)]
        if self.options.shift_average:
            padded = F.pad(x, [1] * 4, mode="reflect")
            views += [(padded[:, :, :-2, :-2], 0.5), (padded[:, :, 2:, 2:], 0.5)]
        for view, share in views:
            yield view, share
            if self.options.flip_average:
                yield view.flip(3), share


def augment(x: Tensor, mirrored: Tensor, noise: torch.Generator, pad: int = 2) -> Tensor:
    """[batch, channels, height, width] -> the same, each image shifted by up to `pad` pixels, and flipped left to right
    where `mirrored` [batch] says so."""
    batch, _, height, width = x.shape
    padded = F.pad(x, [pad] * 4, mode="reflect")
    top, left = (torch.randint(2 * pad + 1, (batch, 1), generator=noise) for _ in range(2))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    index = torch.arange(batch)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
