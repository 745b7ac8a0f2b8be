"""`nano-real` is put together once from what ships and a vision encoder that the user has."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.driven import up_to
from transformers import AutoModel, Dinov2Config, Dinov2Model

from vitos.core.geometry import matched_iou
from vitos.data.readers import read_records
from vitos.nano import DECODER_PATH
from vitos.nano.real import VISION_VARIABLE
from vitos.policy.locate import resolve_model_path
from vitos.policy.vlm import SparseVLM

ROOT = Path(__file__).parents[2]
REAL_VISION = ROOT.parent / "shared" / "models" / "dinov2-small"
REAL_DATA = ROOT.parent / "shared" / "data" / "blood_cells"
needs_vision = pytest.mark.skipif(not REAL_VISION.is_dir(), reason=f"{REAL_VISION} is not on this machine")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(VISION_VARIABLE, str(REAL_VISION))


def test_what_ships_is_small():
    assert sum(path.stat().st_size for path in DECODER_PATH.iterdir()) < 10_000_000


def test_a_missing_vision_encoder_says_what_to_do(monkeypatch):
    monkeypatch.setenv(VISION_VARIABLE, "/nowhere/dinov2")
    with pytest.raises(OSError, match="set VITOS_DINOV2 to a folder"):
        resolve_model_path("nano-real")


def test_another_vision_encoder_is_not_taken_in_silence(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518)
    Dinov2Model(config).save_pretrained(tmp_path / "other")
    monkeypatch.setenv(VISION_VARIABLE, str(tmp_path / "other"))
    with pytest.warns(UserWarning, match="not the one that nano-real was trained with"):
        folder = resolve_model_path("nano-real")
    assert (folder / "model.safetensors").is_file()


@needs_vision
def test_the_whole_checkpoint_is_an_ordinary_one(recwarn):
    folder = resolve_model_path("nano-real")
    assert not [w for w in recwarn if "trained with" in str(w.message)]
    assert resolve_model_path("nano-real") == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    policy = SparseVLM.from_pretrained(folder)
    tower = policy.backbone.model.model.vision_tower.state_dict()
    for name, weight in AutoModel.from_pretrained(REAL_VISION, dtype="float32").state_dict().items():
        assert torch.equal(weight, tower[name]), name
    assert {p.dtype for p in policy.backbone.model.parameters()} == {torch.float32}


@needs_vision
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"{REAL_DATA} is not on this machine")
def test_it_finds_a_white_blood_cell():
    """A question of the train split."""
    record = next(r for r in read_records(REAL_DATA / "train.json") if r.meta["template"] == "wbc_quadrant")
    policy = SparseVLM.from_pretrained("nano-real")
    finding = policy.ask(policy.encode(record.image_paths[0]), record.question, limits=up_to(64))
    assert finding.localization.response.well_formed
    assert matched_iou(finding.boxes, record.boxes) > 0.3
    assert finding.answer == record.answer


OPEN, X, IS, COMMA, Y, CLOSE, BEGIN, END, WORD = range(101, 110)  # tokens; 0 to 100 are numbers


@pytest.fixture
def decoder(monkeypatch):
    """An untrained decoder like that of nano-real, and its embeddings."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from nano_real.start import look_at_places
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=150, hidden_size=192, intermediate_size=576, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=3, attention_bias=True, initializer_range=0.08, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    look_at_places(model.model, model.lm_head.weight.data, list(range(101)), [CLOSE, END])
    return model


@torch.no_grad()
def test_the_decoder_starts_able_to_look_at_a_place(decoder):
    """Attention of an untrained Llama, by the library: at the point or window just read, and at where it was read."""
    from nano_real.projector import GRID, HELD, OUTPUT_RMS, PLACE, PLACE_RMS, place_code

    visual = OUTPUT_RMS * torch.randn(256, 192)
    visual[:, :HELD] = 0
    centres = torch.from_numpy(GRID.centres()).float()
    visual[:, :PLACE] = PLACE_RMS * 2**0.5 * place_code(centres)

    def attention(text, head):
        """Of a closing bracket to visual tokens, after a look at where the last of some words points to."""
        rows = torch.cat([visual, decoder.get_input_embeddings()(torch.tensor([*text, *[WORD] * 6]))])[None]
        seen = decoder(inputs_embeds=rows, output_attentions=True).attentions
        bracket = 255 + len(text)
        assert seen[2][0, :2, -1, bracket].min() > 0.9
        return seen[1][0, head, bracket, :256]

    rng = np.random.default_rng(0)
    for _ in range(40):
        x, y = rng.integers(2, 99, 2)
        looked = attention([OPEN, X, IS, x, COMMA, Y, IS, y, CLOSE], 0)
        off = (centres[looked.argmax()] - torch.tensor([x, y]) / 100).abs().max()
        assert off < 1 / 16  # its own cell, or the next where the place is near the border of both
        low = rng.integers(0, [75, 67])
        window = [low[0], low[1], low[0] + 25, low[1] + 33]
        looked = attention([BEGIN, window[0], COMMA, window[1], COMMA, window[2], COMMA, window[3], END], 1)
        hundredths = 100 * centres
        inside = ((hundredths > torch.tensor(window[:2])) & (hundredths < torch.tensor(window[2:]))).all(-1)
        assert looked[inside].sum() > 0.8 * looked.sum()


@torch.no_grad()
def test_the_decoder_starts_able_to_copy_a_box(decoder):
    """Attention again: at what followed the number just written; where a box begins, at the first numbers of boxes."""
    from nano_real.copy import AGAIN, copy_boxes
    from nano_real.copy import BEGIN as FIRST

    copy_boxes(decoder.model, decoder.lm_head.weight.data, list(range(101)), [BEGIN])
    rng, begins = np.random.default_rng(0), []
    for _ in range(40):
        numbers = rng.permutation(np.arange(0, 100, 6))[:12].reshape(3, 4)
        boxes = [t for box in numbers for t in (BEGIN, box[0], COMMA, box[1], COMMA, box[2], COMMA, box[3], END, WORD)]
        which, place = rng.integers(3), rng.integers(3)
        begun = [BEGIN]
        for number in numbers[which][: place + 1]:
            begun += [number, COMMA]
        seen = decoder(torch.tensor([boxes + begun]), output_attentions=True).attentions
        assert boxes[seen[1][0, AGAIN, -1].argmax()] == numbers[which][place + 1]
        looked = seen[3][0, FIRST, len(boxes), : len(boxes)]
        begins.append(looked[[1, 11, 21]].sum())  # which of them is for training to say
    assert np.mean(begins) > 0.8
