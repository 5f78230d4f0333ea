"""Test a few families of docs/results/attention.csv, each of a different kind; families.py runs all of them."""

import csv
import sys
from pathlib import Path

import pytest
import timm
import transformers

sys.path.insert(0, str(Path(__file__).parent))

from families import TABLE, TIMM, TRANSFORMERS, _inputs, build, examine

from spec_mmdet.conditioning.finding.layouts import KNOWN, find_template, fit_template
from spec_mmdet.conditioning.finding.names import find_named_layers
from spec_mmdet.conditioning.finding.probe import start_probe
from spec_mmdet.conditioning.finding.running import make_example, record_calls

ROWS = [f'| {" | ".join(row)} |' for row in csv.reader(TABLE.read_text().splitlines())]
PAGE = Path(__file__).parents[2] / 'docs' / 'method' / 'attention.md'
FEW = """
test_vit tiny_vit_5m_224 levit_128s mobilevitv2_050 test_maxvit bert bloom codegen convbert deberta distilbert falcon
gpt2 gpt_neox longformer minimax phi3 qwen3_next squeezebert t5 wavlm xlnet
"""


# Families that together cover all classes of the table.
OF_THE_TABLE = """
beit_base_patch16_224 botnet26t_256 cait_xxs24_224 coat_tiny coatnet_nano_rw_224 convit_tiny davit_tiny
edgenext_xx_small efficientformer_l1 efficientvit_b0 eva02_tiny_patch14_224 halonet26t hiera_tiny_224 levit_128s
maxvit_tiny_rw_224 mobilevitv2_050 nest_tiny caformer_s18 pvt_v2_b0 shvit_s1
swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 test_vit3 tiny_vit_5m_224
tnt_s_legacy_patch16_224 twins_pcpvt_small twins_svt_small visformer_tiny vit_relpos_small_patch16_224 volo_d1_224
xcit_nano_12_p16_224 fastvit_sa12
bloom codegen deberta falcon gpt2 gpt_bigcode gpt_neox imagegpt levit mgp-str minimax mobilevitv2
modernbert mpt openai-gpt persimmon phi3 qwen3_next timesformer siglip
"""


SWAP = str.maketrans('QK', 'KQ')


def test_the_table_agrees_with_the_probe():
    seen, wrong = set(), []
    for name in OF_THE_TABLE.split():
        model, _ = build(name)
        calls = record_calls(model, _inputs(model) if name in TRANSFORMERS else make_example(model))
        for path, module in model.named_modules():
            kind = f'{type(module).__module__}.{type(module).__qualname__}'
            template = find_template(module)
            if template is None or kind in seen:
                continue
            (layers,) = find_named_layers(module)[0]
            seen.add(kind)
            layouts = next(fit_template(template, module, layers), None)
            # In CoaT's linear attention, queries and keys each contain a part of the other.
            swapped = layouts and tuple(tuple((role.translate(SWAP), n) for role, n in x) for x in layouts)
            probes = [start_probe(module, layers, call) for call in (None, calls.get(path))]
            if not layouts or not any(x and (x.confirms(layouts) or x.confirms(swapped)) for x in probes):
                wrong.append((name, kind, layouts and [layout[:4] for layout in layouts]))
    assert not wrong
    assert set(KNOWN) - seen <= {'spec_mmdet.models.attention.XCA', 'timm.models.vision_transformer.Attention'}


def versions() -> str:
    return f'timm {timm.__version__} and transformers {transformers.__version__}'


@pytest.mark.parametrize('name', FEW.split())
def test_a_family_is_conditioned_correctly_or_listed(name):
    if name in TRANSFORMERS and name.replace('-', '_') not in transformers.models.__dir__():
        pytest.skip(f'transformers {transformers.__version__} has no {name}')
    line = str(examine(name))
    if versions() in PAGE.read_text():
        assert line in ROWS, f'run python tests/conditioning/families.py: {line}'


def test_the_table_has_every_family():
    assert [row.split(' | ')[0].removeprefix('| ') for row in ROWS[1:]] == [*TIMM, *TRANSFORMERS]
    assert len(TIMM) >= 70 and len(TRANSFORMERS) >= 60
