# pyright: reportMissingImports=false
"""Pictures, masks and the folders they lie in, on small files made here; a damaged file or a wrong folder gives one clear sentence."""

import numpy as np
import pytest
import torch

from headway.tasks.files import DataError
from headway.tasks.image_files import ImageFiles, MaskFiles, read_image, read_mask, write_image
from headway.tasks.image_folders import by_attribute, held_out, list_images, read_attributes, unpaired

Image = pytest.importorskip("PIL.Image")


def picture(path, height=6, width=8, value=None, channels=3):
    """A file of a picture whose red grows to the right and green downwards, or of one value everywhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    image = torch.stack([columns, rows, rows * 0]) if value is None else torch.full((3, height, width), value)
    write_image(path, image[:channels])
    return path


def sentence(error):
    return "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_comes_back_as_it_was_written(tmp_path, suffix, channels):
    image = torch.randint(256, (channels, 5, 7), generator=torch.Generator().manual_seed(0)) / 255
    path = write_image(tmp_path / f"x{suffix}", image[None])
    assert torch.equal(read_image(path, channels), image) and [p.name for p in tmp_path.iterdir()] == [path.name]
    assert read_image(path, 4 - channels).shape == (4 - channels, 5, 7)


def test_a_photograph_as_jpeg_is_near(tmp_path):
    path = picture(tmp_path / "x.JPG", 32, 48)
    assert (read_image(path) - read_image(picture(tmp_path / "x.png", 32, 48))).abs().max() < 0.05


def test_sixteen_bits_palettes_and_a_camera_held_upright_are_understood(tmp_path):
    levels = np.array([[0, 32768], [65535, 256]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png", 1).mul(255).tolist() == [[[0, 128], [255, 1]]]
    picture(tmp_path / "x.png", value=1.0)
    with Image.open(tmp_path / "x.png") as image:
        image.convert("P").save(tmp_path / "palette.png")
        turned = image.getexif()
        turned[0x0112] = 6  # the camera was turned by a quarter
        image.save(tmp_path / "turned.jpg", exif=turned)
    assert (read_image(tmp_path / "palette.png") == 1).all() and read_image(tmp_path / "turned.jpg").shape == (3, 8, 6)


def test_a_size_takes_the_middle_of_a_picture_in_its_shape(tmp_path):
    path = picture(tmp_path / "x.png", 64, 128)
    image = read_image(path, size=(16, 16))
    # half of the width: red from a quarter to three quarters, all of green
    assert image.shape == (3, 16, 16) and image[0, 8, 0] == pytest.approx(0.25, abs=0.04)
    assert image[0, 8, -1] == pytest.approx(0.75, abs=0.04) and image[1, -1, 8] > 0.95
    right = read_image(path, size=(16, 16), place=(0.5, 1.0))
    assert right[0, 8, -1] > 0.95 and right[0, 8, 0] == pytest.approx(0.5, abs=0.04)
    near = read_image(path, size=(16, 16), zoom=2.0)
    assert near[1, 0, 8] == pytest.approx(0.25, abs=0.04) and near[1, -1, 8] == pytest.approx(0.75, abs=0.04)


def test_pictures_are_read_where_they_are_indexed_and_drawn_from_a_generator_alone(tmp_path):
    paths = [picture(tmp_path / f"{i}.png", 12, 20, i / 4) for i in range(4)] + [picture(tmp_path / "x.png", 12, 20)]
    images = ImageFiles(paths, 8)
    assert len(images) == 5 and images[torch.tensor([3, 1])].mean((1, 2, 3)).tolist() == pytest.approx(
        [0.75, 0.25], 1e-2
    )
    assert images[1:].shape == (4, 3, 8, 8) and ImageFiles(paths, (4, 8), 1, signed=True)[:1].tolist() == [
        [[[-1.0] * 8] * 4]
    ]
    places = torch.full((6,), 4)
    drawn = [images.take(places, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    rising = drawn[0][:, 0, 4, -1] > drawn[0][:, 0, 4, 0]
    assert rising.any() and not rising.all()  # some are mirrored


def test_masks_are_true_in_the_hole_and_stay_binary_at_any_size(tmp_path):
    hole = torch.zeros(1, 8, 8)
    hole[:, :4] = 1
    path = write_image(tmp_path / "m.png", hole)
    assert torch.equal(read_mask(path), hole.bool()) and torch.equal(read_mask(path, hole="black"), ~hole.bool())
    assert torch.equal(read_mask(path, (4, 4))[0], torch.arange(4)[:, None].expand(4, 4) < 2)
    soft = write_image(tmp_path / "soft.png", torch.tensor([[[0.4, 0.6]]]))
    assert read_mask(soft).tolist() == [[[False, True]]]
    masks = MaskFiles([path, path], 8, "black")
    assert masks[:].shape == (2, 1, 8, 8) and masks[:].dtype == torch.bool
    assert torch.equal(masks.take(torch.tensor([0]), torch.Generator().manual_seed(0))[0], ~hole.bool())


@pytest.mark.parametrize(
    ("suffix", "damage", "words"),
    [
        *((suffix, lambda raw: raw[: len(raw) // 2], "is no whole picture") for suffix in (".png", ".jpg")),
        (".png", lambda raw: b"", "is empty; a picture was expected"),
        (".jpg", lambda raw: b"plain text", r"is no whole picture \(its kind is unknown\)"),
        (".png", lambda raw: raw[:40] + bytes(20) + raw[60:], "is no whole picture"),
    ],
)
def test_a_damaged_picture_is_one_sentence(tmp_path, suffix, damage, words):
    path = picture(tmp_path / f"x{suffix}", 20, 20)
    path.write_bytes(damage(path.read_bytes()))
    for read in (read_image, read_mask, lambda p: ImageFiles([p], 4)[:]):
        with pytest.raises(DataError, match=words) as error:
            read(path)
        assert sentence(error) and str(path) in str(error.value)


def test_what_cannot_be_read_or_written_is_one_sentence(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(DataError, match="cannot be read") as error:
            read_image(path)
        assert sentence(error)
    for image, name, words in (
        (torch.zeros(2, 4, 4), "x.png", "1 or 3, H, W"),
        (torch.full((3, 4, 4), torch.nan), "x.png", "finite"),
        (torch.zeros(3, 4, 4), "x.doc", "names no kind of picture"),
    ):
        with pytest.raises(ValueError, match=words):
            write_image(tmp_path / name, image)
    for call, words in (
        (lambda: read_image("x.png", 2), "channels are 1 or 3"),
        (lambda: read_mask("x.png", hole="grey"), '"white" or "black"'),
        (lambda: ImageFiles([], 4), "the list of paths is empty"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert not list(tmp_path.iterdir())


def test_without_pillow_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"install headway\[images\]"):
        read_image(tmp_path / "x.png")


def test_a_folder_gives_all_its_pictures_in_order_and_a_list_those_it_names(tmp_path):
    paths = [picture(tmp_path / name, 2, 2) for name in ("b.png", "a/2.jpg", "a/1.png", "with blank.png")]
    (tmp_path / "notes.txt").write_text("no picture")
    assert list_images(tmp_path) == sorted(paths)
    (tmp_path / "train.flist").write_text("/a/2.jpg 17\n\nb.png\nwith blank.png\n" + str(paths[2]) + "\n")
    assert list_images(tmp_path / "train.flist") == [paths[1], paths[0], paths[3], paths[2]]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "val.txt").write_text("b.png 3")
    assert list_images(tmp_path / "lists" / "val.txt", tmp_path) == [paths[0]]
    with pytest.raises(DataError, match=r"names 1 file\(s\) of 1 that are not there, first 'b.png 3'.*give root="):
        list_images(tmp_path / "lists" / "val.txt")


def test_folders_and_lists_without_pictures_are_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for where, words in (
        ("empty", "holds no picture ending in"),
        ("none", "cannot be read"),
        ("x.png", "is one picture or none"),
        ("empty.txt", "is empty; a list has the path"),
        ("bytes.txt", "is no text"),
    ):
        with pytest.raises(DataError, match=words) as error:
            list_images(tmp_path / where)
        assert sentence(error)
    with pytest.raises(DataError, match="at least two are needed"):
        held_out([tmp_path])
    names = [tmp_path / str(i) for i in range(25)]
    assert held_out(names) == ([*names[:9], *names[10:19], *names[20:]], [names[9], names[19]])
    assert held_out(names[:3]) == (names[:2], names[2:3])


def test_two_unpaired_domains_lie_in_four_folders(tmp_path):
    made = {
        part: [picture(tmp_path / part / f"{i}.jpg", 2, 2) for i in range(n)]
        for part, n in {"trainA": 3, "trainB": 20, "testA": 2}.items()
    }
    found = unpaired(tmp_path)
    assert found.train_a == made["trainA"] and found.test_a == made["testA"]
    assert sorted([*found.train_b, *found.test_b]) == sorted(made["trainB"]) and len(found.test_b) == 2  # a tenth
    picture(tmp_path / "testB" / "0.png", 2, 2)
    assert [len(part) for part in unpaired(tmp_path)] == [3, 20, 2, 1]


def test_domains_that_are_not_there_are_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "half" / "trainA").mkdir(parents=True)
    for folder, words in (("none", "is no folder"), ("empty", "is empty"), ("half", "holds trainA")):
        with pytest.raises(DataError, match=f"{words}; two domains lie in its folders trainA and trainB") as error:
            unpaired(tmp_path / folder)
        assert sentence(error)
    (tmp_path / "half" / "trainB").mkdir()
    with pytest.raises(DataError, match="trainA holds no picture"):
        unpaired(tmp_path / "half")


FACES = [("000001.jpg", "-1  1"), ("000002.jpg", " 1  1"), ("000003.jpg", "-1 -1"), ("000004.jpg", " 1 -1")]


def faces(folder, suffix=".jpg", lines=FACES, count=None):
    """CelebA's layout with four faces, of which the even ones smile."""
    for name, _ in FACES:
        picture((folder / "img_align_celeba" / name).with_suffix(suffix), 2, 2)
    rows = "".join(f"{name} {marks}\n" for name, marks in lines)
    (folder / "list_attr_celeba.txt").write_text(f"{len(lines) if count is None else count}\nSmiling Young\n{rows}")
    return folder


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_faces_without_and_with_an_attribute_are_two_domains(tmp_path, suffix):
    files, names, marks = read_attributes(faces(tmp_path, suffix) / "list_attr_celeba.txt")
    assert files == [name for name, _ in FACES] and names == ["Smiling", "Young"]
    assert marks.tolist() == [[False, True], [True, True], [False, False], [True, False]]
    found = by_attribute(tmp_path, "Smiling")
    assert [[path.stem[-1] for path in part] for part in found] == [["1"], ["2"], ["3"], ["4"]]
    (tmp_path / "list_eval_partition.txt").write_text(
        "".join(f"{name} {2 * (i < 2)}\n" for i, name in enumerate(files))
    )
    found = by_attribute(tmp_path, "Smiling")
    assert [[path.stem[-1] for path in part] for part in found] == [["3"], ["4"], ["1"], ["2"]]
    with pytest.raises(DataError, match=r"has 2 picture\(s\) without Young: too few to train"):
        by_attribute(tmp_path, "Young")


def test_the_table_as_csv_says_the_same(tmp_path):
    plain = read_attributes(faces(tmp_path) / "list_attr_celeba.txt")
    rows = "".join(f"{name},{marks.strip().replace('  ', ',').replace(' ', ',')}\n" for name, marks in FACES)
    (tmp_path / "x.csv").write_text("image_id,Smiling,Young\n" + rows)
    found = read_attributes(tmp_path / "x.csv")
    assert found[:2] == plain[:2] and (found[2] == plain[2]).all()


def test_a_damaged_list_of_attributes_is_one_sentence(tmp_path):
    faces(tmp_path, count=5)
    for change, words in (
        (lambda: None, "is cut short: it names 5 files and has 4"),
        (lambda: faces(tmp_path, lines=[*FACES[:2], ("000003.jpg", "1")]), r"the line of file 3 \(000003.jpg\) has 1 values"),
        (lambda: faces(tmp_path, lines=[("000001.jpg", "1 yes")]), "2 of 1 or -1 belong there"),
        (lambda: faces(tmp_path, lines=[]), "is no list of attributes"),
        (lambda: faces(tmp_path, lines=[*FACES, ("9.jpg", "1 1")]), r"names 1 file\(s\) of 5 that do not lie under .*first 9.jpg"),
        (lambda: faces(tmp_path, lines=FACES[::2]), r"has 0 picture\(s\) with Smiling"),
    ):  # fmt: skip
        change()
        with pytest.raises(DataError, match=words) as error:
            by_attribute(tmp_path, "Smiling")
        assert sentence(error)
    with pytest.raises(DataError, match="has no attribute 'smiling'; it has Smiling, Young"):
        by_attribute(faces(tmp_path), "smiling")
    (tmp_path / "list_eval_partition.txt").write_text("000001.jpg train\n")
    with pytest.raises(DataError, match="is no partition of the same files"):
        by_attribute(tmp_path, "Smiling")
    (tmp_path / "list_attr_celeba.txt").unlink()
    with pytest.raises(DataError, match="but not list_attr_celeba"):
        by_attribute(tmp_path, "Smiling")
