"""`nano-real` is put together once from what ships and a vision encoder that the user has."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, Dinov2Config, Dinov2Model

from vitos.data.readers import read_records
from vitos.geometry import matched_iou
from vitos.nano import DECODER_PATH, resolve_model_path
from vitos.nano.real import VISION_VARIABLE
from vitos.policy import SparseVLM

ROOT = Path(__file__).parents[1]
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
    finding = policy.ask(policy.encode(record.image_paths[0]), record.question, max_tokens=64)
    assert finding.localization.response.well_formed
    assert matched_iou(finding.boxes, record.boxes) > 0.3
    assert finding.answer == record.answer


def test_the_decoder_starts_able_to_look_at_a_place(monkeypatch):
    """Attention of an untrained Llama, by the library: at the point or window just read, and at where it was read."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from nano_real.projector import GRID, HELD, OUTPUT_RMS, PLACE, PLACE_RMS, place_code
    from nano_real.start import look_at_places
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=150, hidden_size=192, intermediate_size=576, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, attention_bias=True, initializer_range=0.08, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    open_, x_, is_, comma, y_, close, begin, end, word = range(101, 110)
    look_at_places(model.model, model.lm_head.weight.data, list(range(101)), [close, end])
    visual = OUTPUT_RMS * torch.randn(256, 192)
    visual[:, :HELD] = 0
    centres = torch.from_numpy(GRID.centres()).float()
    visual[:, :PLACE] = PLACE_RMS * 2**0.5 * place_code(centres)

    def attention(text, head):
        """Of a closing bracket to visual tokens, after a look at where the last of some words points to."""
        rows = torch.cat([visual, model.get_input_embeddings()(torch.tensor([*text, *[word] * 6]))])[None]
        seen = model(inputs_embeds=rows, output_attentions=True).attentions
        bracket = 255 + len(text)
        assert seen[2][0, :2, -1, bracket].min() > 0.9
        return seen[1][0, head, bracket, :256]

    rng = np.random.default_rng(0)
    with torch.no_grad():
        for _ in range(40):
            x, y = rng.integers(2, 99, 2)
            looked = attention([open_, x_, is_, x, comma, y_, is_, y, close], 0)
            off = (centres[looked.argmax()] - torch.tensor([x, y]) / 100).abs().max()
            assert off < 1 / 16  # its own cell, or the next where the place is near the border of both
            low = rng.integers(0, [75, 67])
            window = [low[0], low[1], low[0] + 25, low[1] + 33]
            looked = attention([begin, window[0], comma, window[1], comma, window[2], comma, window[3], end], 1)
            hundredths = 100 * centres
            inside = ((hundredths > torch.tensor(window[:2])) & (hundredths < torch.tensor(window[2:]))).all(-1)
            assert looked[inside].sum() > 0.8 * looked.sum()
