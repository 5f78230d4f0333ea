"""Test condition() on families of timm and transformers against the weights that the models compute with.

    python tests/conditioning/families.py           writes docs/results/attention.csv, in about 20 minutes
    python tests/conditioning/families.py NAME ...  prints the rows of these

Models are small and random, built from their own configurations without a download. reading.py reads the origin of
queries, keys and values from a run. The condition numbers of those rows are compared with the report's.
"""

import csv
import inspect
import os
import sys
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from reading import read

os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import transformers

from spec_mmdet import InputError
from spec_mmdet.conditioning import condition
from spec_mmdet.conditioning.finding.projections import find

TABLE = Path(__file__).parents[2] / 'docs' / 'results' / 'attention.csv'
HEADING = '| model | attention | projections | verdict |'

# The smallest architecture of each family in timm.
_TIMM = """
beit_base_patch16_224 botnet26t_256 cait_xxs24_224 coat_tiny coat_lite_tiny coatnet_nano_rw_224
coatnext_nano_rw_224 convit_tiny cpubone_nano crossvit_tiny_240 csatv2 davit_tiny deit_tiny_patch16_224
deit_tiny_distilled_patch16_224 deit3_small_patch16_224 eca_botnext26ts_256 edgenext_xx_small efficientformer_l1
efficientformerv2_s0 efficientvim_m1 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 flexivit_small
gcvit_xxtiny halonet26t hiera_tiny_224 lambda_resnet26t levit_128s levit_conv_128s lowformer_b0 maxvit_rmlp_pico_rw_256
maxvit_tiny_rw_224 maxxvit_rmlp_nano_rw_256 mobilenetv4_hybrid_medium mobilevit_xxs mobilevitv2_050 mvitv2_tiny
nest_tiny nextvit_small pit_ti_224 pit_ti_distilled_224 poolformer_s12 caformer_s18 pvt_v2_b0 repvit_m0_9 resnet18
resnetv2_50d_gn sehalonet33ts shvit_s1 skresnet18 swiftformer_xs swin_tiny_patch4_window7_224
swin_s3_tiny_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 test_maxvit test_vit test_vit2 test_vit3 test_vit4
tiny_vit_5m_224 tnt_s_legacy_patch16_224 twins_pcpvt_small twins_svt_small visformer_tiny vit_relpos_small_patch16_224
vit_srelpos_small_patch16_224 vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vit_xsmall_patch16_clip_224 vitamin_small_224
volo_d1_224 xcit_nano_12_p8_224 xcit_nano_12_p16_224 fastvit_sa12
vit_pwee_patch16_reg1_gap_256
vit_dwee_patch16_reg1_gap_256 focalnet_tiny_srf
"""

_TRANSFORMERS = """
albert aria_text audio-spectrogram-transformer bart beit bert bert-generation big_bird bigbird_pegasus biogpt bitnet
blenderbot bloom camembert canine clip codegen cohere cohere2 conditional_detr convbert cpmant ctrl cvt data2vec-audio
data2vec-text data2vec-vision deberta deberta-v2 deepseek_v3 deit detr diffllama dinov2 distilbert dpr dpt electra
ernie exaone4 falcon falcon_h1 flaubert fnet fsmt gemma gemma2 git glm glm4 glpn gpt2 gpt_bigcode gpt_neo gpt_neox
gpt_oss gptj granite hubert ibert ijepa imagegpt jetmoe layoutlm led levit llama longformer longt5 m2m_100 marian
markuplm mbart megatron-bert mgp-str minimax mistral mixtral mobilebert mobilevit mobilevitv2 modernbert moonshine
mpnet mpt mt5 nystromformer olmo olmo2 olmoe openai-gpt opt pegasus_x persimmon phi phi3 plbart prophetnet pvt pvt_v2
qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next rembert roberta roformer rwkv segformer sew siglip splinter squeezebert
stablelm starcoder2 switch_transformers t5 table-transformer tapas timesformer umt5 unispeech videomae vilt
visual_bert vit vit_mae vivit wav2vec2 wav2vec2-conformer wavlm whisper xglm xlm xlm-roberta xlnet yolos
"""

TIMM, TRANSFORMERS = _TIMM.split(), _TRANSFORMERS.split()

_SIZES = {
    key: size
    for size, keys in {
        32: 'hidden_size d_model n_embd embed_dim dim emb_dim n_embed embedding_size moe_intermediate_size',
        2: 'num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers '
        'num_experts num_local_experts n_routed_experts num_key_value_heads eos_token_id',
        4: 'num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads rotary_dim',
        8: 'head_dim d_kv kv_channels',
        48: 'intermediate_size d_ff encoder_ffn_dim decoder_ffn_dim ffn_dim n_inner hidden_dim',
        64: 'max_position_embeddings n_positions n_ctx image_size',
        99: 'vocab_size',
        16: 'patch_size',
        3: 'num_channels',
        1: 'pad_token_id num_experts_per_tok',
        0: 'bos_token_id',
    }.items()
    for key in keys.split()
}
# These are small already, or their sizes depend on each other.
_AS_THEY_ARE = {'levit', 'mobilevitv2', 'mobilevit', 'cvt', 'segformer', 'pvt', 'pvt_v2', 'glpn'}
_FURTHER = {
    kind: dict(backbone='resnet18', use_timm_backbone=True, use_pretrained_backbone=False, backbone_config=None)
    for kind in ('detr', 'conditional_detr', 'table-transformer')
}
_FURTHER['gpt_neo'] = dict(attention_types=[[['global', 'local'], 1]], num_layers=2)
_FURTHER['deepseek_v3'] = dict(num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=8)

# Attention without a softmax between two products, which reading.py cannot read: rows as the forward splits them.
_BY_HAND = {
    'FactorAttnConvRelPosEnc': lambda module, rows: rows.chunk(3),
    'LinearSelfAttention': lambda module, rows: rows.split([1, module.embed_dim, module.embed_dim]),
    'MobileViTV2LinearSelfAttention': lambda module, rows: rows.split([1, module.embed_dim, module.embed_dim]),
    'LiteMLA': lambda module, rows: rows.view(-1, 3, module.dim).unbind(1),
    'MiniMaxLightningAttention': lambda module, rows: rows.view(module.num_attention_heads, 3, -1).unbind(1),
}


@dataclass
class Verdict:
    name: str
    attention: str
    projections: int
    words: str

    def __str__(self) -> str:
        return f'| {self.name} | {self.attention} | {self.projections or ""} | {self.words} |'


def build(name: str):
    """A model and a function that runs it."""
    torch.manual_seed(0)
    if name in TIMM:
        for fewer in ({'depth': 2}, {'depths': (1, 1, 1, 1)}, {}):
            try:
                model = timm.create_model(name, num_classes=3, **fewer).eval()
                break
            except Exception:  # no such argument, or not so few stages
                continue
        image = torch.randn(1, *model.pretrained_cfg['input_size'])
        return model, lambda: model(image)
    model = transformers.AutoModel.from_config(_config(name)).eval()
    inputs = _inputs(model)
    return model, lambda: model(**inputs)


def _config(kind: str):
    config = transformers.AutoConfig.for_model(kind, **_FURTHER.get(kind, {}))
    if kind in _AS_THEY_ARE:
        return config

    def smaller(config):
        said = config.to_dict()
        sizes = {key: size for key, size in _SIZES.items() if type(said.get(key)) is int}
        if isinstance(said.get('layer_types'), list):
            kinds = list(dict.fromkeys(said['layer_types']))
            sizes['layer_types'] = (2 * kinds)[: max(2, len(kinds))]
            sizes['num_hidden_layers'] = len(sizes['layer_types'])
        for key, part in vars(config).items():
            if isinstance(part, transformers.PretrainedConfig):
                sizes[key] = {**smaller(part), 'model_type': part.model_type}
        return sizes

    return type(config)(**(smaller(config) | _FURTHER.get(kind, {})))


def _inputs(model) -> dict:
    takes, config = inspect.signature(model.forward).parameters, model.config
    tokens = torch.randint(5, 60, (1, 16))
    inputs = {key: tokens for key in ('input_ids', 'decoder_input_ids') if key in takes}
    if 'pixel_values' in takes:
        vision = getattr(config, 'vision_config', config)
        size = getattr(vision, 'image_size', 64)
        size = (size, size) if isinstance(size, int) else size
        frames = (vision.num_frames,) if hasattr(vision, 'num_frames') and 'input_ids' not in takes else ()
        inputs['pixel_values'] = torch.randn(1, *frames, getattr(vision, 'num_channels', 3), *size)
    if model.main_input_name == 'input_values':
        spectrogram = getattr(config, 'max_length', None), getattr(config, 'num_mel_bins', None)
        inputs['input_values'] = torch.randn(1, *(spectrogram if spectrogram[1] else (4000,)))
    if model.main_input_name == 'input_features':
        inputs['input_features'] = torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions)
    if 'global_attention_mask' in takes:
        inputs['global_attention_mask'] = torch.eye(16, dtype=torch.long)[:1]
    if 'use_cache' in takes:
        inputs['use_cache'] = False
    return inputs


def examine(name: str) -> Verdict:
    """Compare what condition() does to a model with the model's own computation.

    Raises:
        AssertionError: if it is silently wrong: rows, heads or condition numbers differ from the model's own, or
            attention is neither conditioned nor listed.
    """
    model, run = build(name)
    found = find(model)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    weights = {projection.name: names[id(projection.weight)] for projection in found.projections}
    truth = _compare_rows(model, read(model, run), found, weights)

    listed = [*found.refused, *found.uncovered]
    untold = [key for key in truth.keys() - set(weights.values()) if not any(_is_part(key, path) for path in listed)]
    assert not untold, f'neither taken nor listed: {sorted(untold)}'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            report, whole = condition(model), True
        except InputError:
            report, whole = condition(model, partial=True) if found.projections else [], False
    assert whole == (not listed and bool(found.projections))
    _compare_condition_numbers(report, found, truth, weights)
    if not found.projections and not listed:
        return Verdict(name, '', 0, 'no attention, and refused as such')
    kinds = ', '.join(sorted({type(projection.attention).__name__ for projection in found.projections}))
    words = 'right'
    if found.refused:
        words = f'refused: the rows of {_classes(model, found.refused)} could not be told'
    elif found.uncovered:
        words = f'{"in part" if kinds else "not taken"}: {_classes(model, found.uncovered)} is listed'
    return Verdict(name, kinds, len(found.projections), words)


def _classes(model, listed: dict[str, str]) -> str:
    """Return the classes of listed attention, or of the owners of listed layers."""
    classes = set()
    for path in listed:
        while not list(model.get_submodule(path).children()) or 'Norm' in type(model.get_submodule(path)).__name__:
            path = path.rpartition('.')[0]
        classes.add(type(model.get_submodule(path)).__name__)
    return ', '.join(sorted(classes))


def _is_part(weight: str, path: str) -> bool:
    """Return whether a weight belongs to a listed module, or to the module of a listed layer."""
    return weight.startswith((f'{path}.', f'{path.rpartition(".")[0]}.'))


def _compare_rows(model, events, found, weights) -> dict[str, dict[str, frozenset[int]]]:
    """Compare the rows and heads that were found with those read from a run; return the latter, by weight and role."""
    read_rows = defaultdict(lambda: defaultdict(set))
    read_heads = defaultdict(lambda: defaultdict(set))
    for event in events:
        for role, parts in event.rows.items():
            for weight, rows in parts.items():
                read_rows[weight][role] |= rows
        for role, parts in event.heads.items():
            for weight in parts[0]:
                sets = {part.get(weight, frozenset()) for part in parts}
                # If a normalisation spans all heads, each head comes from all rows.
                if len(sets) > 1 and sum(map(len, sets)) == len(frozenset.union(*sets)):
                    read_heads[weight][role] |= sets
    for projection in found.projections:
        weight, selection = weights[projection.name], projection.rows
        rows = torch.tensor(selection.index or range(len(selection.take(projection.weight))))
        by_hand = _BY_HAND.get(type(projection.attention).__name__)
        if weight not in read_rows and by_hand:
            parts = by_hand(projection.attention, torch.arange(len(projection.weight)))
            read_rows[weight] = {role: set(part.flatten().tolist()) for role, part in zip('QKV', parts)}
        assert weight in read_rows, f'{weight} is taken, but attention was not seen to use it'
        for role, part in zip(selection.roles, rows.chunk(len(selection.roles))):
            assert set(part.tolist()) == read_rows[weight][role], f'{weight} {role}'
            if projection.heads and read_heads[weight][role]:
                heads = {frozenset(head.tolist()) for head in part.chunk(projection.heads)}
                assert heads == read_heads[weight][role], f'{weight} {role}: heads'
    return read_rows


def _compare_condition_numbers(report, found, truth, weights) -> None:
    """Compare the report's kappa(W + C) with that of the rows that the layer now computes with."""
    reported, owners = defaultdict(list), {}
    for row in report:
        reported[weights[row.name]].append(row.conditioned_kappa)
    for projection in found.projections:
        owners[weights[projection.name]] = projection
    for weight, projection in owners.items():
        W = getattr(projection.module, projection.tensor).detach().double().flatten(1)
        W = W.T if 'Conv1D' in type(projection.module).__name__ else W
        expected = [np.linalg.cond(W[sorted(rows)].numpy()) for rows in truth[weight].values()]
        np.testing.assert_allclose(sorted(reported[weight]), sorted(expected), rtol=1e-2, err_msg=weight)


def rows(names) -> tuple[list[str], list[str]]:
    """Return the table's rows, and the failures."""
    lines, wrong = [], []
    for name in names:
        try:
            lines.append(str(examine(name)))
            print(lines[-1], flush=True)
        except Exception as error:
            wrong.append(f'{name}: {type(error).__name__}: {str(error).strip()[:300]}')
            print(wrong[-1], flush=True)
    return lines, wrong


if __name__ == '__main__':
    asked = sys.argv[1:]
    lines, wrong = rows(asked or [*TIMM, *TRANSFORMERS])
    if not asked:
        with TABLE.open('w', newline='') as file:
            csv.writer(file, lineterminator='\n').writerows(line[2:-2].split(' | ') for line in (HEADING, *lines))
    sys.exit(bool(wrong))
