import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mlr1.errors import TeacherError
from megatron_mlr1.teacher.identity import identify, tokenizer_sha256, weight_files
from tests.support.teachers import BOS, VOCABULARY

CPU = torch.device("cpu")


@pytest.fixture
def folder(teacher_folder, tmp_path):
    return shutil.copytree(teacher_folder, tmp_path / "copy")


def fingerprint(folder, dtype="float32"):
    return identify(folder, CPU, dtype).fingerprint


def test_a_copy_under_another_name_is_the_same_teacher(teacher_folder, folder):
    one, other = (identify(path, CPU, "float32") for path in (teacher_folder, folder))
    assert (one.name, other.name) == ("tiny-llama", "copy")
    assert one.fingerprint == other.fingerprint
    assert (one.vocab_size, one.hidden_size, one.bos_id) == (VOCABULARY, 64, BOS)
    assert len(one.short) == 8


def test_one_changed_weight_makes_another_teacher(teacher_folder, folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = min(weights)
    flat = weights[name].view(-1)
    flat[0] = torch.nextafter(flat[0], torch.tensor(9.0))
    save_file(weights, path, metadata={"format": "pt"})
    assert fingerprint(folder) != fingerprint(teacher_folder)


def test_the_same_weights_in_other_files_are_the_same_teacher(teacher_folder, folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    names = sorted(weights)
    path.unlink()
    for number, part in enumerate((names[:5], names[5:])):
        save_file({name: weights[name] for name in part}, folder / f"part{number}.safetensors")
    assert fingerprint(folder) == fingerprint(teacher_folder)


@pytest.mark.parametrize(
    ("change", "is_same"), [({"rope_theta": 1.0}, False), ({"transformers_version": "9"}, True)]
)
def test_of_the_config_only_what_decides_answers_counts(teacher_folder, folder, change, is_same):
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    assert (fingerprint(folder) == fingerprint(teacher_folder)) == is_same


def test_type_and_threads_are_part_of_the_identity(teacher_folder):
    threads = torch.get_num_threads()
    prints = {fingerprint(teacher_folder), fingerprint(teacher_folder, "bfloat16")}
    try:
        torch.set_num_threads(threads + 1)
        prints.add(fingerprint(teacher_folder))
    finally:
        torch.set_num_threads(threads)
    assert len(prints) == 3


def test_a_tokenizers_hash_is_of_its_ids_alone(folder):
    before = tokenizer_sha256(folder)
    path = folder / "tokenizer.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved, indent=8))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_sha256(folder) == before
    words = saved["model"]["vocab"]
    words["w5"], words["w6"] = words["w6"], words["w5"]
    path.write_text(json.dumps(saved))
    assert tokenizer_sha256(folder) != before


def test_a_folder_without_its_parts_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(TeacherError, match="safetensors"):
        identify(folder, CPU, "float32")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TeacherError, match="tokenizer"):
        identify(folder, CPU, "float32")
    (folder / "config.json").write_text("{}")
    with pytest.raises(TeacherError, match="vocab_size"):
        identify(folder, CPU, "float32")
    with pytest.raises(TeacherError, match="is no folder"):
        weight_files(folder / ("a" * 300))


def test_a_broken_file_of_weights_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(TeacherError, match="cannot be read"):
        identify(folder, CPU, "float32")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(folder):
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": VOCABULARY - 1}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(TeacherError, match="vocab_size"):
        identify(folder, CPU, "float32")
