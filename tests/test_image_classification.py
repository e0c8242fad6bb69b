"""Image classification: readers, models, augmentation, the order of images, the metric."""

import gzip
import io
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfstep.errors import DataError, RecipeError
from halfstep.tasks import image_classification
from halfstep.tasks.image_classification import (
    FASHION_FOLDER,
    ImageClassification,
    Images,
    Options,
    augment,
    read_cifar10,
    read_digits,
    read_fashion,
)
from halfstep.training import TrainSettings

FASHION = {"train": 7, "t10k": 3}


def write_idx(folder: Path, *, zipped: bool) -> dict[str, np.ndarray]:
    """Four idx files as upstream writes them; returns what went in."""
    noise = np.random.default_rng(0)
    written: dict[str, np.ndarray] = {}
    for split, count in FASHION.items():
        images = noise.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = noise.integers(0, 10, count, dtype=np.uint8)
        for name, values, head in (
            (f"{split}-images-idx3-ubyte", images, struct.pack(">4i", 2051, count, 28, 28)),
            (f"{split}-labels-idx1-ubyte", labels, struct.pack(">2i", 2049, count)),
        ):
            raw = head + values.tobytes()
            (folder / (f"{name}.gz" if zipped else name)).write_bytes(gzip.compress(raw) if zipped else raw)
            written[name] = values
    return written


def write_cifar(folder: Path, *, columns: tuple[str, str] = ("img", "label"), size: int = 32) -> dict[str, np.ndarray]:
    """train.parquet and test.parquet in the hub's schema; returns the pixels and labels that went in."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")
    noise = np.random.default_rng(1)
    written: dict[str, np.ndarray] = {}
    for split, count in (("train", 6), ("test", 4)):
        pixels = noise.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        cells = []
        for picture in pixels:
            buffer = io.BytesIO()
            image.fromarray(picture).save(buffer, format="PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        labels = np.arange(count) % 10
        kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        table = pyarrow.table({columns[0]: pyarrow.array(cells, kind), columns[1]: pyarrow.array(labels)})
        parquet.write_table(table, folder / f"{split}.parquet")
        written[f"{split} pixels"], written[f"{split} labels"] = pixels, labels
    return written


def make_task(*, seed: int = 0, batch_size: int = 32, options: Options | None = None) -> ImageClassification:
    return ImageClassification(options or Options(), TrainSettings(seed=seed, batch_size=batch_size))


class TestDigits:
    def test_every_fifth_image_is_held_out(self) -> None:
        images = read_digits("")
        assert images.train.shape == (1437, 1, 8, 8)
        assert images.held_out.shape == (360, 1, 8, 8)
        assert images.train_labels.dtype == images.held_out_labels.dtype == torch.int64
        assert set(images.train_labels.tolist()) == set(images.held_out_labels.tolist()) == set(range(10))
        assert images.train.min() == 0
        assert images.train.max() == 1

    def test_the_task_normalises_by_the_train_images(self) -> None:
        task, raw = make_task(), read_digits("")
        assert task.images.train.mean().abs() < 1e-5
        assert (task.images.train.std() - 1).abs() < 1e-5
        expected = (raw.held_out - raw.train.mean()) / raw.train.std()
        torch.testing.assert_close(task.images.held_out, expected)


class TestFashion:
    @pytest.mark.parametrize("zipped", [False, True])
    def test_idx_files_are_read_pixel_by_pixel(self, tmp_path: Path, zipped: bool) -> None:
        written = write_idx(tmp_path, zipped=zipped)
        images = read_fashion(str(tmp_path))
        for split, x, y in (
            ("train", images.train, images.train_labels),
            ("t10k", images.held_out, images.held_out_labels),
        ):
            assert x.dtype == torch.float32
            assert np.array_equal((x[:, 0] * 255).round().numpy(), written[f"{split}-images-idx3-ubyte"])
            assert y.tolist() == written[f"{split}-labels-idx1-ubyte"].tolist()

    def test_the_file_that_is_missing_is_named(self, tmp_path: Path) -> None:
        write_idx(tmp_path, zipped=True)
        (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
        with pytest.raises(DataError, match="t10k-labels-idx1-ubyte"):
            read_fashion(str(tmp_path))

    def test_a_folder_that_does_not_exist_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="nowhere"):
            read_fashion(str(tmp_path / "nowhere"))

    @pytest.mark.parametrize("damage", ["cut off", "empty", "not gzip"])
    def test_a_damaged_file_is_a_data_error(self, tmp_path: Path, damage: str) -> None:
        write_idx(tmp_path, zipped=damage == "not gzip")
        name = "train-images-idx3-ubyte" + (".gz" if damage == "not gzip" else "")
        whole = (tmp_path / name).read_bytes()
        kept = {"cut off": whole[:1000], "empty": b"", "not gzip": b"not gzip at all"}[damage]
        (tmp_path / name).write_bytes(kept)
        with pytest.raises(DataError, match="train-images-idx3-ubyte"):
            read_fashion(str(tmp_path))

    def test_images_and_labels_of_different_counts_are_a_data_error(self, tmp_path: Path) -> None:
        write_idx(tmp_path, zipped=False)
        labels = tmp_path / "train-labels-idx1-ubyte"
        labels.write_bytes(labels.read_bytes()[:-2])
        with pytest.raises(DataError):
            read_fashion(str(tmp_path))

    def test_without_the_data_anywhere_the_message_says_how_to_get_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(image_classification, "FASHION_FOLDER", tmp_path / "nowhere")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(DataError, match="dataset-fashion-mnist"):
            read_fashion("")

    @pytest.mark.skipif(not FASHION_FOLDER.exists(), reason=f"no Fashion-MNIST in {FASHION_FOLDER}")
    def test_the_real_data_has_the_published_counts_and_mean(self) -> None:
        images = read_fashion("")
        assert images.train.shape == (60_000, 1, 28, 28)
        assert images.held_out.shape == (10_000, 1, 28, 28)
        assert images.train.mean().item() == pytest.approx(0.2860, abs=5e-5)
        assert images.train_labels.bincount().tolist() == [6_000] * 10
        assert images.held_out_labels.bincount().tolist() == [1_000] * 10


class TestCifar10:
    def test_parquet_files_are_read_pixel_by_pixel(self, tmp_path: Path) -> None:
        written = write_cifar(tmp_path)
        images = read_cifar10(str(tmp_path))
        for split, x, y in (
            ("train", images.train, images.train_labels),
            ("test", images.held_out, images.held_out_labels),
        ):
            assert x.shape[1:] == (3, 32, 32)
            assert np.array_equal((x.permute(0, 2, 3, 1) * 255).round().numpy(), written[f"{split} pixels"])
            assert y.tolist() == written[f"{split} labels"].tolist()

    def test_the_task_trains_on_them(self, tmp_path: Path) -> None:
        write_cifar(tmp_path)
        options = Options(dataset="cifar10", data=str(tmp_path), model="resnet9", width=4)
        task = make_task(batch_size=3, options=options)
        loss = task.measure_loss(task.build_model(), task.make_batch(1))
        loss.backward()
        assert torch.isfinite(loss)

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        write_cifar(tmp_path)
        (tmp_path / "test.parquet").unlink()
        with pytest.raises(DataError, match=r"test\.parquet"):
            read_cifar10(str(tmp_path))

    def test_a_file_that_is_no_parquet_is_named(self, tmp_path: Path) -> None:
        write_cifar(tmp_path)
        (tmp_path / "train.parquet").write_text("img,label\n")
        with pytest.raises(DataError, match=r"train\.parquet.*parquet"):
            read_cifar10(str(tmp_path))

    @pytest.mark.parametrize("columns", [("image", "label"), ("img", "fine_label")])
    def test_wrong_columns_are_named_beside_the_right_ones(self, tmp_path: Path, columns: tuple[str, str]) -> None:
        write_cifar(tmp_path, columns=columns)
        with pytest.raises(DataError, match=f"img and label; got {', '.join(columns)}"):
            read_cifar10(str(tmp_path))

    def test_bytes_that_are_no_image_are_a_data_error(self, tmp_path: Path) -> None:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        write_cifar(tmp_path)
        table = pyarrow.table({"img": [{"bytes": b"no image", "path": None}], "label": [1]})
        parquet.write_table(table, tmp_path / "test.parquet")
        with pytest.raises(DataError):
            read_cifar10(str(tmp_path))

    def test_no_rows_are_a_data_error(self, tmp_path: Path) -> None:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        write_cifar(tmp_path)
        kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        table = pyarrow.table({"img": pyarrow.array([], kind), "label": pyarrow.array([], pyarrow.int64())})
        parquet.write_table(table, tmp_path / "train.parquet")
        with pytest.raises(DataError, match="no rows"):
            read_cifar10(str(tmp_path))

    def test_without_a_folder_and_without_the_hub_the_message_says_what_to_give(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(DataError, match=r"train\.parquet.*\.\[hub\]"):
            read_cifar10("")


def test_the_seed_decides_the_initial_weights() -> None:
    weights = [make_task(seed=seed).build_model().state_dict()["0.weight"] for seed in (3, 3, 4)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_early_images_are_small_and_later_ones_are_as_they_were() -> None:
    plain, small = (
        ImageClassification(Options(**extra), TrainSettings(steps=10, batch_size=3))  # type: ignore[arg-type]
        for extra in ({}, {"early_size": 6, "early_share": 0.4})
    )
    for step in (1, 4, 5, 10):
        expected, found = plain.make_batch(step)[0], small.make_batch(step)[0]
        if step > 4:
            assert torch.equal(found, expected)
        else:
            assert found.shape == (3, 1, 6, 6)
            torch.testing.assert_close(found.mean((2, 3)), expected.mean((2, 3)), rtol=0, atol=0.15)


def test_early_size_for_a_model_of_one_size_is_refused_before_training() -> None:
    options = Options(early_size=6, early_share=0.5)
    with pytest.raises(RecipeError, match="model cnn does not take images of early_size=6 points; leave it out"):
        make_task(options=options).build_model()
    assert make_task(options=replace(options, model="resnet18", width=8)).build_model().training


def test_images_that_the_model_does_not_take_are_refused_before_training() -> None:
    task = make_task()
    task.images = replace(task.images, train=task.images.train[..., :6])
    with pytest.raises(DataError, match="model cnn does not take images of 8x6 points; give square ones"):
        task.build_model()


def find_shifts(image: Tensor, result: Tensor, pad: int) -> list[tuple[int, int, bool]]:
    """Slow reference: every (rows, columns, mirrored) that turns the image into the result."""
    size = image.shape[-1]
    padded = F.pad(image[None], [pad] * 4, mode="reflect")[0]
    found = []
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            piece = padded[:, top : top + size, left : left + size]
            for mirrored in (False, True):
                if torch.equal(piece.flip(2) if mirrored else piece, result):
                    found.append((top, left, mirrored))
    return found


class TestAugment:
    @pytest.mark.parametrize(("channels", "size", "pad"), [(1, 16, 4), (3, 12, 2)])
    def test_each_output_is_a_shifted_or_mirrored_copy_of_its_image(self, channels: int, size: int, pad: int) -> None:
        x = torch.randn(24, channels, size, size)
        mirrored = torch.arange(24) % 3 == 0
        y = augment(x, mirrored, torch.Generator().manual_seed(5), pad)
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        for image, result, flipped in zip(x, y, mirrored, strict=True):
            assert [found for _, _, found in find_shifts(image, result, pad)] == [bool(flipped)]

    def test_rows_and_columns_vary_over_their_range(self) -> None:
        x = torch.randn(120, 1, 6, 6)
        y = augment(x, torch.zeros(120, dtype=torch.bool), torch.Generator().manual_seed(1), 1)
        shifts = [find_shifts(image, result, 1)[0] for image, result in zip(x, y, strict=True)]
        assert {top for top, _, _ in shifts} == {left for _, left, _ in shifts} == {0, 1, 2}
        assert len(set(shifts)) == 9

    def test_the_noise_decides_all_of_it(self) -> None:
        x = torch.randn(16, 3, 8, 8)
        plain = torch.zeros(16, dtype=torch.bool)
        first, again, other = (augment(x, plain, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


class TestBatches:
    def number_images(self, task: ImageClassification, count: int) -> None:
        """Replace the images by ones that show their own number."""
        numbers = torch.arange(count, dtype=torch.float32)
        shown = numbers[:, None, None, None].expand(count, 1, 8, 8).contiguous()
        task.images = Images(shown, numbers.long() % 10, shown, numbers.long() % 10)

    def numbers_in_epoch(self, task: ImageClassification, epoch: int, batches: int) -> list[int]:
        steps = range(epoch * batches + 1, (epoch + 1) * batches + 1)
        return [int(v) for step in steps for v in task.make_batch(step)[0][:, 0, 0, 0]]

    @pytest.mark.parametrize("augmented", [False, True])
    def test_every_image_is_visited_once_an_epoch(self, augmented: bool) -> None:
        task = make_task(batch_size=8, options=Options(augment=augmented))
        self.number_images(task, 40)
        first, second = (self.numbers_in_epoch(task, epoch, 5) for epoch in (0, 1))
        assert sorted(first) == sorted(second) == list(range(40))
        assert first != second

    def test_every_image_is_mirrored_in_every_other_epoch(self) -> None:
        task = make_task(batch_size=8, options=Options(augment=True))
        shown = torch.arange(40.0)[:, None, None, None] + torch.linspace(0, 0.9, 64)[None, None, None, :]
        shown = shown.expand(40, 1, 8, 64).contiguous()
        task.images = Images(shown, torch.arange(40) % 10, shown, torch.arange(40) % 10)
        sides = []
        for epoch in range(4):
            batches = [task.make_batch(step)[0] for step in range(5 * epoch + 1, 5 * epoch + 6)]
            images = torch.cat(batches)[:, 0, 4, 8:56]
            sides.append({int(row[20]): bool(row[0] > row[-1]) for row in images})
        assert sides[0] == sides[2]
        assert sides[1] == sides[3] == {number: not mirrored for number, mirrored in sides[0].items()}
        assert 5 < sum(sides[0].values()) < 35

    def test_no_image_comes_twice_when_the_last_batch_would_be_short(self) -> None:
        task = make_task(batch_size=8)
        self.number_images(task, 43)
        numbers = self.numbers_in_epoch(task, 0, 5)
        assert len(numbers) == len(set(numbers)) == 40

    def test_a_batch_larger_than_the_data_holds_all_of_it(self) -> None:
        task = make_task(batch_size=100)
        self.number_images(task, 20)
        assert sorted(self.numbers_in_epoch(task, 3, 1)) == list(range(20))

    def test_labels_stay_with_their_images(self) -> None:
        task = make_task(batch_size=8)
        self.number_images(task, 40)
        x, y = task.make_batch(3)
        assert torch.equal(x[:, 0, 0, 0].long() % 10, y)

    def test_depend_on_seed_and_step_alone(self) -> None:
        options = Options(augment=True)
        one, other = make_task(options=options), make_task(options=options)
        expected = [one.make_batch(step) for step in (1, 2, 50)]
        torch.manual_seed(9)
        for step, (x, y) in ((50, expected[2]), (1, expected[0])):
            again = other.make_batch(step)
            assert torch.equal(again[0], x)
            assert torch.equal(again[1], y)
        assert not torch.equal(expected[0][0], make_task(seed=1, options=options).make_batch(1)[0])


class TestLossAndMetric:
    def test_a_constant_model_is_as_accurate_as_its_class_is_frequent(self) -> None:
        task = make_task()

        class Says3(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return F.one_hot(torch.full((len(x),), 3), 10).float()

        expected = 100 * (task.images.held_out_labels == 3).float().mean().item()
        assert task.evaluate(Says3()) == pytest.approx(expected)
        assert (task.metric.name, task.metric.unit, task.metric.higher_is_better) == ("accuracy", "%", True)

    def test_counts_every_held_out_image_beyond_one_batch(self) -> None:
        task = make_task()
        labels = torch.arange(1203) % 10
        shown = labels.float()[:, None, None, None].expand(-1, 1, 8, 8)
        task.images = Images(task.images.train, task.images.train_labels, shown, labels)

        class Reads(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return F.one_hot(x[:, 0, 0, 0].long(), 10).float()

        assert task.evaluate(Reads()) == 100
        task.images.held_out_labels[-3:] += 1
        assert task.evaluate(Reads()) == pytest.approx(100 * 1200 / 1203)

    def test_flip_average_adds_the_probabilities_of_the_mirror_image(self) -> None:
        plain, averaged = make_task(), make_task(options=Options(flip_average=True))
        model = plain.build_model()
        x, y = plain.images.held_out, plain.images.held_out_labels
        with torch.no_grad():
            together = model(x).softmax(1) + model(x.flip(3)).softmax(1)
            expected = 100 * (together.argmax(1) == y).float().mean().item()
            assert averaged.evaluate(model) == pytest.approx(expected)
            assert averaged.evaluate(model) != plain.evaluate(model)

    def test_shift_average_adds_those_of_two_shifted_images_by_half(self) -> None:
        plain = make_task(options=Options(flip_average=True))
        averaged = make_task(options=Options(flip_average=True, shift_average=True))
        model, (x, y) = plain.build_model(), (plain.images.held_out, plain.images.held_out_labels)
        up, down = (F.pad(x, [1] * 4, mode="reflect")[..., n : n + 8, n : n + 8] for n in (0, 2))
        with torch.no_grad():
            first, second, third = ((model(v).softmax(1) + model(v.flip(3)).softmax(1)) for v in (x, up, down))
        expected = 100 * ((first + (second + third) / 2).argmax(1) == y).float().mean().item()
        assert averaged.evaluate(model) == pytest.approx(expected)
        assert averaged.evaluate(model) != plain.evaluate(model)

    def test_label_smoothing_reaches_the_loss(self) -> None:
        task = make_task(options=Options(label_smoothing=0.2))
        model, (x, y) = task.build_model(), task.make_batch(1)
        with torch.no_grad():
            logs = model(x).log_softmax(1)
            expected = -(0.8 * logs.gather(1, y[:, None]).mean() + 0.2 * logs.mean())
            torch.testing.assert_close(task.measure_loss(model, (x, y)), expected)
