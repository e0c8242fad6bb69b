"""Text generation: the corpus and its split, batches, the model, the metric."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from halfstep.errors import DataError, RecipeError
from halfstep.tasks.text_generation import Options, TextGeneration, Transformer, find_corpus, read_corpus
from halfstep.training import TrainSettings

SMALL = {"layers": 1, "width": 16, "heads": 2, "context": 8, "held_out_sequences": 6}


def write_files(folder: Path, count: int) -> list[str]:
    """Files of one unique word each, some in a subfolder."""
    words = [f"word{i:03d}" for i in range(count)]
    for i, word in enumerate(words):
        path = folder / ("deep" if i % 3 == 0 else ".") / f"{word}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{word} " * 20)
    return words


def words_of(text: Tensor) -> set[str]:
    return set(bytes(text.tolist()).decode().split())


def make_task(path: Path, *, seed: int = 0, batch_size: int = 4) -> TextGeneration:
    return TextGeneration(Options(data=str(path), **SMALL), TrainSettings(seed=seed, batch_size=batch_size))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_files(tmp_path, 40)
    return tmp_path


class Uniform(nn.Module):
    """Every byte is as likely as any other."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(*x.shape, 256)


class TestCorpus:
    def test_every_file_is_on_one_side_of_the_split_only(self, tmp_path: Path) -> None:
        words = write_files(tmp_path, 60)
        train, held_out = (words_of(part) for part in read_corpus(str(tmp_path)))
        assert train | held_out == set(words)
        assert not train & held_out
        assert 1 <= len(held_out) <= 20

    def test_the_split_is_the_same_in_every_process_and_version(self, tmp_path: Path) -> None:
        write_files(tmp_path, 60)
        _, held_out = read_corpus(str(tmp_path))
        assert sorted(words_of(held_out)) == ["word003", "word005", "word021", "word042", "word059"]

    def test_adding_files_moves_no_other_file_across_the_split(self, tmp_path: Path) -> None:
        write_files(tmp_path, 40)
        _, before = (words_of(part) for part in read_corpus(str(tmp_path)))
        write_files(tmp_path, 80)
        _, after = (words_of(part) for part in read_corpus(str(tmp_path)))
        assert before == {word for word in after if word < "word040"}

    def test_the_split_does_not_depend_on_where_the_folder_is(self, tmp_path: Path) -> None:
        write_files(tmp_path / "a", 40)
        write_files(tmp_path / "b" / "c", 40)
        here, there = read_corpus(str(tmp_path / "a")), read_corpus(str(tmp_path / "b" / "c"))
        assert all(torch.equal(x, y) for x, y in zip(here, there, strict=True))

    def test_the_last_tenth_of_a_single_file_is_held_out(self, tmp_path: Path) -> None:
        path = tmp_path / "one.txt"
        path.write_bytes(bytes(range(1, 101)))
        train, held_out = read_corpus(str(path))
        assert train.tolist() == list(range(1, 91))
        assert held_out.tolist() == list(range(91, 101))
        assert train.dtype == held_out.dtype == torch.uint8

    def test_a_folder_with_one_file_is_split_inside_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "one.txt").write_bytes(b"x" * 50)
        assert [len(part) for part in read_corpus(str(tmp_path))] == [45, 5]

    @pytest.mark.parametrize("corpus", ["source.txt", "book.txt"])  # of which the first is held out by its name
    def test_a_folder_in_which_one_file_is_nearly_all_of_the_text_is_split_inside_it(
        self, tmp_path: Path, corpus: str
    ) -> None:
        (tmp_path / corpus).write_bytes(b"corpus " * 10_000)
        (tmp_path / "README.md").write_bytes(b"about it " * 10)
        (tmp_path / "titles.txt").write_bytes(b"its titles " * 10)
        train, held_out = read_corpus(str(tmp_path))
        assert len(held_out) == pytest.approx(len(train) / 9, rel=0.01)
        assert all(b"corpus corpus" in bytes(part.tolist()) for part in (train, held_out))

    def test_without_data_the_standard_library_is_read(self) -> None:
        names = {path.name for path in find_corpus()}
        assert {"argparse.py", "dataclasses.py", "tempfile.py"} <= names
        train, held_out = read_corpus("")
        assert len(train) > 5_000_000
        assert 200_000 < len(held_out) < len(train)

    def test_tests_and_installed_packages_are_no_part_of_the_standard_library(self) -> None:
        parts = {part for path in find_corpus() for part in path.parts}
        assert not parts & {"site-packages", "dist-packages", "idle_test", "__pycache__"}


class TestBadData:
    def refuse(self, path: Path, *words: str) -> None:
        with pytest.raises(DataError) as caught:
            make_task(path)
        assert all(word in str(caught.value) for word in (str(path), *words)), str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_missing_path_is_named(self, tmp_path: Path) -> None:
        self.refuse(tmp_path / "nowhere", "no text at")

    def test_an_empty_folder_is_refused(self, tmp_path: Path) -> None:
        self.refuse(tmp_path, "0 bytes")

    def test_an_empty_file_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "empty.txt"
        path.touch()
        self.refuse(path, "0 bytes")

    def test_a_binary_file_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "image.bin"
        path.write_bytes(b"GIF89a" + bytes(100))
        self.refuse(path, "not text")

    def test_a_binary_file_in_a_folder_is_named(self, folder: Path) -> None:
        (folder / "deep" / "weights.bin").write_bytes(bytes(100))
        with pytest.raises(DataError, match=r"weights\.bin"):
            read_corpus(str(folder))

    def test_text_shorter_than_the_context_is_refused_with_both_lengths(self, tmp_path: Path) -> None:
        path = tmp_path / "short.txt"
        path.write_bytes(b"x" * 80)
        with pytest.raises(DataError, match="8 bytes for a context of 8"):
            make_task(path)

    def test_text_that_holds_one_whole_window_is_enough(self, tmp_path: Path) -> None:
        path = tmp_path / "enough.txt"
        path.write_bytes(b"x" * 100)
        inputs, targets = make_task(path).make_batch(1)
        assert inputs.shape == targets.shape == (4, 8)

    def test_a_width_that_the_heads_do_not_divide_is_refused(self, folder: Path) -> None:
        with pytest.raises(RecipeError, match="width=16, heads=3"):
            TextGeneration(Options(data=str(folder), **(SMALL | {"heads": 3})), TrainSettings())


class TestBatches:
    def test_depend_on_seed_and_step_alone(self, folder: Path) -> None:
        one, other = make_task(folder), make_task(folder)
        expected = [one.make_batch(step) for step in (1, 2, 3)]
        torch.manual_seed(77)
        for step in (3, 1, 2):
            torch.rand(5)
            assert all(torch.equal(a, b) for a, b in zip(other.make_batch(step), expected[step - 1], strict=True))

    def test_leave_the_global_random_state_alone(self, folder: Path) -> None:
        task = make_task(folder)
        before = torch.get_rng_state()
        task.make_batch(5)
        assert torch.equal(torch.get_rng_state(), before)

    def test_differ_between_steps_and_between_seeds(self, folder: Path) -> None:
        first = make_task(folder).make_batch(1)[0]
        assert not torch.equal(first, make_task(folder).make_batch(2)[0])
        assert not torch.equal(first, make_task(folder, seed=1).make_batch(1)[0])

    def test_targets_are_the_inputs_one_byte_later(self, folder: Path) -> None:
        inputs, targets = make_task(folder).make_batch(1)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert inputs.dtype == targets.dtype == torch.int64

    def test_are_pieces_of_the_train_text(self, folder: Path) -> None:
        task = make_task(folder)
        text = bytes(task.train.tolist())
        inputs, targets = task.make_batch(1)
        for row, last in zip(inputs.tolist(), targets[:, -1].tolist(), strict=True):
            assert bytes([*row, last]) in text

    def test_reach_the_last_byte_of_the_train_text(self, tmp_path: Path) -> None:
        path = tmp_path / "enough.txt"
        path.write_bytes(b"x" * 99 + b"y" + b"z" * 11)  # the train text is 100 bytes, its last one a y
        task = make_task(path, batch_size=64)
        assert any(ord("y") in task.make_batch(step)[1][:, -1].tolist() for step in range(1, 20))


class TestModel:
    def test_gives_256_logits_for_each_byte(self) -> None:
        logits = Transformer(layers=2, width=16, heads=4, context=8)(torch.randint(256, (3, 8)))
        assert logits.shape == (3, 8, 256)
        assert logits.dtype == torch.float32

    def test_takes_less_than_the_context(self) -> None:
        assert Transformer(layers=1, width=16, heads=2, context=8)(torch.randint(256, (2, 3))).shape == (2, 3, 256)

    @pytest.mark.parametrize("changed", [1, 4, 7])
    def test_a_later_byte_leaves_earlier_logits_unchanged(self, changed: int) -> None:
        torch.manual_seed(0)
        model = Transformer(layers=2, width=32, heads=4, context=8)
        x = torch.randint(256, (2, 8))
        y = x.clone()
        y[:, changed] = (y[:, changed] + 1) % 256
        with torch.no_grad():
            before, after = model(x), model(y)
        torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=0, atol=1e-6)
        assert ((after[:, changed:] - before[:, changed:]).abs().amax((0, 2)) > 1e-5).all()

    def test_the_seed_decides_the_initial_weights(self, folder: Path) -> None:
        models = [make_task(folder, seed=seed).build_model().state_dict() for seed in (0, 0, 1)]
        assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
        assert not torch.equal(models[0]["head.weight"], models[2]["head.weight"])


class TestMetric:
    def test_a_uniform_model_takes_8_bits_per_byte(self, folder: Path) -> None:
        task = make_task(folder)
        assert task.evaluate(Uniform()) == pytest.approx(8.0, abs=1e-5)
        assert (task.metric.name, task.metric.unit, task.metric.higher_is_better) == ("bits per byte", "bit", False)

    @pytest.mark.parametrize("batch_size", [1, 4, 100])
    def test_does_not_depend_on_the_batch_size(self, folder: Path, batch_size: int) -> None:
        model = make_task(folder).build_model()
        with torch.no_grad():
            whole = make_task(folder, batch_size=6).evaluate(model)
            assert make_task(folder, batch_size=batch_size).evaluate(model) == pytest.approx(whole, abs=1e-5)

    def test_is_taken_on_held_out_text(self, folder: Path) -> None:
        task = make_task(folder)
        task.train = torch.zeros_like(task.train)
        task.held_out = torch.full_like(task.held_out, 65)

        class Expects65(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return 100.0 * nn.functional.one_hot(torch.full_like(x, 65), 256).float()

        assert task.evaluate(Expects65()) == pytest.approx(0.0, abs=1e-5)

    def test_covers_held_out_text_of_many_million_bytes(self, folder: Path) -> None:
        task = make_task(folder)
        task.held_out = torch.zeros((1 << 24) + 3 + 9, dtype=torch.uint8)  # beyond the integers that fp32 can count
        assert task.evaluate(Uniform()) == pytest.approx(8.0, abs=1e-5)
