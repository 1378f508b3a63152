import shlex

import pytest
from streams.tiny_layouts import write_domain_lists, write_tree

from clmerge.cli.fit import build_parser
from clmerge.streams import DomainFolders, DomainLists, ImageFolderSource, PrefixDomains
from clmerge.streams.source_groups import domain_names


@pytest.mark.parametrize("split_first", [False, True])
def test_folders_of_domains(tmp_path, split_first):
    for part, number in (("train", 3), ("test", 2)):
        for domain in ("art", "photo"):
            top = tmp_path / part / domain if split_first else tmp_path / domain / part
            write_tree(top, ["cat", "dog"], number)
    group = DomainFolders(tmp_path, domains=["photo", "art"], split_first=split_first, templates="DomainNet")
    sources = group.sources()
    assert [source.name for source in sources] == ["photo", "art"]
    assert [(len(source.train()), len(source.test())) for source in sources] == [(6, 4), (6, 4)]
    assert all("photo" in path.parts for path in sources[0].train().paths)
    assert len(sources[0].templates) == 80


def test_folders_without_a_split(tmp_path):
    write_tree(tmp_path / "art", ["cat", "dog"], 5)
    (source,) = DomainFolders(tmp_path, domains=["art"]).sources()
    assert (len(source.train()), len(source.test())) == (8, 2)


@pytest.mark.parametrize("split_first", [False, True])
def test_a_validation_folder_of_another_name(tmp_path, split_first):
    for part, number in (("train", 3), ("test", 2), ("kept", 1)):
        write_tree(tmp_path / part / "art" if split_first else tmp_path / "art" / part, ["cat", "dog"], number)
    (source,) = DomainFolders(tmp_path, domains=["art"], split_first=split_first, val_folder="kept").sources()
    assert {path.parts[-4 + (not split_first)] for path in source.val().paths} == {"kept"}
    assert [len(images) for images in (source.train(), source.test(), source.val())] == [6, 4, 2]


def test_lists_of_validation_images(tmp_path):
    write_domain_lists(tmp_path, ["real"])
    (tmp_path / "real_test.txt").rename(tmp_path / "real_val.txt")
    (tmp_path / "real_test.txt").write_text((tmp_path / "real_train.txt").read_text())
    (source,) = DomainLists(tmp_path, domains=["real"], val_list="{}_val.txt").sources()
    assert len(source.val()) == 8
    with pytest.raises(ValueError, match="for the domain in the name of a list, got 'val"):
        DomainLists(tmp_path, val_list="val.txt")


def test_lists_of_domains_in_the_published_order(tmp_path):
    domains = ["clipart", "sketch", "real", "infograph", "quickdraw", "painting"]
    write_domain_lists(tmp_path, domains)
    sources = DomainLists(tmp_path).sources()
    assert [source.name for source in sources] == domains
    assert all("quickdraw" in path.parts for path in sources[4].test().paths)


def test_file_name_prefix_is_the_domain(tmp_path):
    for prefix in ("art", "deviantart", "sketch"):
        write_tree(tmp_path, ["cat", "dog"], 10, prefix=prefix)
    tree = ImageFolderSource(tmp_path, name="ImageNetR")
    sources = PrefixDomains(tree, domains=["sketch", "art"]).sources()
    assert [source.name for source in sources] == ["sketch", "art"]
    assert all(path.name.startswith("art_") for path in sources[1].train().paths)
    assert len(sources[1].train()) + len(sources[1].test()) == 20
    assert sources[0].class_names == ["cat", "dog"]
    assert sources[0].templates == tree.templates
    with pytest.raises(RuntimeError, match="begin with 'toy_'"):
        PrefixDomains(tree, domains=["toy"]).sources()[0].train()


@pytest.mark.parametrize("split_first", [False, True])
def test_without_domains_the_folders_are_listed_with_the_option_to_paste(tmp_path, split_first):
    tops = [tmp_path / "train", tmp_path / "test"] if split_first else [tmp_path]
    for top in tops:
        for domain in ("photo", "art work"):
            write_tree(top / domain, ["cat", "dog"], 2)
    with pytest.raises(ValueError, match="has 2 folders") as error:
        DomainFolders(tmp_path, split_first=split_first).sources()
    option = shlex.split(str(error.value).partition("by name: ")[2])
    assert option == ['--stream.sources.domains=["art work", "photo"]']
    named = [
        "--model.backbone=OpenClip",
        "--stream=DomainIncremental",
        "--stream.sources=DomainFolders",
        f"--stream.sources.root={tmp_path}",
    ]
    stream = build_parser().parse_args([*named, *option]).stream
    assert stream.init_args.sources.init_args.domains == ["art work", "photo"]


def test_without_domains_folders_of_splits_are_no_domains(tmp_path):
    for split in ("train", "test"):
        write_tree(tmp_path / split / "photo", ["cat"], 1)
    with pytest.raises(ValueError, match=r"folders of splits \(test, train\): set split_first=true"):
        DomainFolders(tmp_path).sources()
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        with pytest.raises(ValueError, match=f"expected folders of domains in .*{folder}, found none"):
            DomainFolders(tmp_path / folder).sources()


def test_published_order_of_the_renditions():
    names = domain_names("magmax_imagenet_r")
    assert len(names) == len(set(names)) == 15
    assert names[:3] == ["tattoo", "sketch", "graphic"]


def test_domains_that_make_no_sense():
    with pytest.raises(ValueError, match="expected domains to be a list or one of"):
        domain_names("magmax_domainet")
    for wrong in ([], ["a", "a"]):
        with pytest.raises(ValueError, match="different names, at least one"):
            domain_names(wrong)
    with pytest.raises(ValueError, match="for the domain in the name of a list"):
        DomainLists("x", train_list="train.txt")
