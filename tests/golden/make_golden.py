"""Writes tests/golden/*.json: losses, gradients and training runs made with PyTorch. See README.md.

    python make_golden.py            write the files beside this script
    python make_golden.py --check    compute them again and compare with what is there
"""

import argparse
import json
import math
import pathlib
import sys

import torch

import reference as ref

HERE = pathlib.Path(__file__).resolve().parent
STEPS = 10

ADAMW = dict(lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip=2.0)
SGD = dict(lr=0.05, momentum=0.9, weight_decay=0.01, clip=4.0)
# clip_grad_norm_ multiplies by min(1, clip / (norm + 1e-6)).
CLIP_EPSILON = 1e-6

MODELS = {
    "gpt2_tiny": dict(
        config=ref.Config("gpt2", 2, 48, 3, 3, 192, 131, 40, True), batch=2, length=33),
    "llama_mha_untied": dict(
        config=ref.Config("llama", 2, 48, 3, 3, 128, 131, 64, False), batch=2, length=33),
    "llama_gqa_tied": dict(
        config=ref.Config("llama", 2, 96, 6, 2, 160, 97, 64, True), batch=2, length=29),
    "llama_odd_mlp": dict(
        config=ref.Config("llama", 2, 40, 5, 1, 107, 65, 64, False), batch=3, length=31),
    "llama_packed": dict(
        config=ref.Config("llama", 2, 48, 6, 3, 99, 97, 64, True), batch=2, length=37,
        starts=[[0, 11, 12, 30], [0, 36]]),
    "gpt2_packed": dict(
        config=ref.Config("gpt2", 2, 40, 5, 5, 157, 129, 48, True), batch=2, length=37,
        starts=[[0, 1, 20], [0, 17, 34]]),
}


def l2(x):
    return x.double().pow(2).sum().sqrt().item()


def summary(x, samples=8):
    """L2 norm, sum and sampled entries by flat row-major index; the largest entry is among them."""
    flat = x.detach().double().reshape(-1)
    n = flat.numel()
    picked = {0, n - 1, int(flat.abs().argmax())}
    i = 0
    while len(picked) < min(samples, n):
        picked.add((ref.word("samples", i) >> 32) % n)
        i += 1
    return {"l2": l2(flat), "sum": flat.sum().item(),
            "samples": [[i, flat[i].item()] for i in sorted(picked)]}


# ---------------------------------------------------------------------------------------------
# Models


def documents_of(case):
    """[B, T]: the number of the document that a token belongs to; a document starts at `starts`."""
    if "starts" not in case:
        return None
    rows = [[sum(t >= s for s in starts) - 1 for t in range(case["length"])] for starts in case["starts"]]
    return torch.tensor(rows)


def batch_of(name, case, step):
    """tokens, labels [B, T] of a step: the next token is the label, and the last token of a
    document has none."""
    b, t, c = case["batch"], case["length"], case["config"]
    ids = ref.integers(f"{name}.tokens.{step}", (b, t + 1), c.vocab)
    tokens, labels = ids[:, :-1], ids[:, 1:].clone()
    documents = documents_of(case)
    if documents is not None:
        labels[:, :-1][documents[:, 1:] != documents[:, :-1]] = -1
    return tokens, labels


def gradients(c, p, tokens, labels, documents):
    loss = ref.model_loss(c, p, tokens, labels, documents)
    grads = torch.autograd.grad(loss, list(p.values()))
    return loss.item(), dict(zip(p, grads))


def total_norm(grads):
    return math.sqrt(sum(l2(g) ** 2 for g in grads.values()))


def train(name, case, dtype, rule):
    c = case["config"]
    p = ref.make_parameters(c, dtype)
    matrices = [x for x in p.values() if x.dim() == 2]
    others = [x for x in p.values() if x.dim() != 2]
    options = ADAMW if rule == "adamw" else SGD
    groups = [{"params": matrices, "weight_decay": options["weight_decay"]},
              {"params": others, "weight_decay": 0.0}]
    if rule == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=options["lr"], eps=options["eps"],
                                      betas=(options["beta1"], options["beta2"]))
    else:
        optimizer = torch.optim.SGD(groups, lr=options["lr"], momentum=options["momentum"])
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = ref.model_loss(c, p, *batch_of(name, case, step), documents_of(case))
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(p.values(), options["clip"]).item())
        optimizer.step()
    return losses, norms, p


def model_case(name, case):
    c = case["config"]
    documents = documents_of(case)
    tokens, labels = batch_of(name, case, 0)
    out = {
        "kind": "model", "name": name,
        "config": {"family": c.family, "layers": c.layers, "d_model": c.d_model, "heads": c.heads,
                   "kv_heads": c.kv_heads, "mlp": c.mlp, "vocab": c.vocab, "context": c.context,
                   "tied": c.tied, "eps": c.eps, "theta": c.theta},
        "weights": {k: {"scale": s, "offset": o} for k, (s, o) in ref.SCALES.items()},
        "batch": case["batch"], "sequence_length": case["length"], "steps": STEPS,
        "tokens": tokens.tolist(), "labels": labels.tolist(),
    }
    if documents is not None:
        out["documents"] = documents.tolist()

    p = ref.make_parameters(c, torch.float64)
    loss, grads = gradients(c, p, tokens, labels, documents)
    out["loss"], out["grad_norm"] = loss, total_norm(grads)
    out["parameters"] = {
        k: {"shape": list(p[k].shape), "first": [x.item() for x in p[k].detach().reshape(-1)[:2]],
            "decayed": p[k].dim() == 2, "gradient": summary(g)}
        for k, g in grads.items()}

    for rule, options in (("adamw", ADAMW), ("sgd", SGD)):
        losses, norms, trained = train(name, case, torch.float64, rule)
        out[rule] = dict(options, clip_epsilon=CLIP_EPSILON, losses=losses, grad_norms=norms,
                         parameters={k: summary(x, 3) for k, x in trained.items()})

    single = {}
    p = ref.make_parameters(c, torch.float32)
    single["loss"], grads = gradients(c, p, tokens, labels, documents)
    single["grad_norm"] = total_norm(grads)
    for rule in ("adamw", "sgd"):
        single[rule + "_losses"], single[rule + "_grad_norms"], _ = train(name, case, torch.float32, rule)
    out["float32"] = single

    # bf16 products with f32 master weights, and with the weights themselves rounded to bf16.
    half = {}
    for key, rounded in (("autocast", False), ("rounded_weights", True)):
        p = ref.make_parameters(c, torch.float32)
        if rounded:
            p = {k: x.detach().bfloat16().float().requires_grad_() for k, x in p.items()}
        with torch.autocast("cpu", torch.bfloat16):
            loss = ref.model_loss(c, p, tokens, labels, documents)
        grads = torch.autograd.grad(loss, list(p.values()))
        half[key] = {"loss": loss.item(), "grad_norm": total_norm(dict(zip(p, grads)))}
    out["bf16"] = half
    return out


# ---------------------------------------------------------------------------------------------
# Ops


class OpCase:
    """Collects the formula of every input, then the outputs and the gradients of
    sum over outputs of <output, d_output>."""

    def __init__(self, op, name, **options):
        self.name = name
        self.out = {"kind": "op", "op": op, "name": name, "options": options, "inputs": {},
                    "integers": {}, "outputs": {}, "gradients": {}}
        self.leaves = {}

    def value(self, key, shape, scale=2.0, offset=0.0):
        self.out["inputs"][key] = {"stream": f"{self.name}.{key}", "shape": list(shape), "scale": scale,
                                   "offset": offset}
        return ref.values(f"{self.name}.{key}", shape, scale, offset)

    def leaf(self, key, shape, scale=2.0, offset=0.0):
        self.leaves[key] = self.value(key, shape, scale, offset).requires_grad_()
        return self.leaves[key]

    def integer(self, key, x):
        self.out["integers"][key] = x.tolist()
        return x

    def output(self, key, x):
        self.out["outputs"][key] = summary(x)

    def backward(self, y, dy):
        grads = torch.autograd.grad(y, list(self.leaves.values()), dy)
        self.out["gradients"] = {k: summary(g) for k, g in zip(self.leaves, grads)}
        return self.out


def attention_case(name, b, t, s, n, k, h, *, q_document=None, k_document=None, **options):
    case = OpCase("attention", name, scale=1 / math.sqrt(h), causal=options.get("causal", True),
                  window=options.get("window", 0), query_offset=options.get("query_offset", 0))
    q, key, v = case.leaf("q", (b, t, n, h), 4.0), case.leaf("k", (b, s, k, h), 4.0), case.leaf("v", (b, s, k, h))
    if q_document is not None:
        q_document = case.integer("q_document", torch.tensor(q_document))
        k_document = case.integer("k_document", torch.tensor(k_document))
    out, lse = ref.attention(q, key, v, q_document=q_document, k_document=k_document, **options)
    case.output("out", out)
    case.output("lse", lse)
    return case.backward(out, case.value("dout", out.shape))


def segments(*lengths):
    return [i for i, n in enumerate(lengths) for _ in range(n)]


def linear_cross_entropy_case(name, m, d, v, ignored, scale):
    case = OpCase("linear_cross_entropy", name)
    x, w = case.leaf("x", (m, d), scale), case.leaf("w", (v, d), 0.5)
    labels = ref.integers(name + ".labels", (m,), v)
    labels[ignored] = -1
    labels = case.integer("labels", labels)
    losses = ref.cross_entropy(x @ w.T, labels)
    case.output("losses", losses)
    count = int((labels >= 0).sum())
    case.out["options"]["gradient_scale"] = 1 / count
    return case.backward(losses, torch.full_like(losses, 1 / count))


def op_cases():
    cases = [
        attention_case("attention_causal_gqa", 2, 19, 19, 6, 2, 16),
        attention_case("attention_full", 2, 7, 23, 3, 3, 8, causal=False),
        attention_case("attention_window", 2, 41, 41, 4, 2, 16, window=5),
        attention_case("attention_offset", 1, 5, 21, 4, 4, 16, query_offset=16),
    ]
    packed = [segments(1, 12, 24), segments(20, 16, 1)]
    cases.append(attention_case("attention_documents", 2, 37, 37, 4, 2, 16, q_document=packed, k_document=packed))
    cases.append(attention_case("attention_documents_window", 2, 37, 37, 3, 1, 8, window=7, q_document=packed,
                                k_document=packed))
    cases.append(linear_cross_entropy_case("linear_cross_entropy_ignored", 37, 24, 97, [0, 5, 6, 36], 2.0))
    # Logits in the hundreds: exp overflows f32 unless the row maximum is taken out.
    cases.append(linear_cross_entropy_case("linear_cross_entropy_large", 11, 24, 65, [3], 1024.0))

    for name, offset in (("rms_norm", 0.0), ("rms_norm_offset", 64.0)):
        case = OpCase("rms_norm", name, eps=1e-5)
        y = ref.rms_norm(case.leaf("x", (13, 45), 4.0, offset), case.leaf("weight", (45,), 0.5, 1.0), 1e-5)
        case.output("out", y)
        cases.append(case.backward(y, case.value("dout", y.shape)))
    for name, offset in (("layer_norm", 0.0), ("layer_norm_offset", 64.0)):
        case = OpCase("layer_norm", name, eps=1e-5)
        y = ref.layer_norm(case.leaf("x", (13, 45), 4.0, offset), case.leaf("weight", (45,), 0.5, 1.0),
                           case.leaf("bias", (45,), 0.5), 1e-5)
        case.output("out", y)
        cases.append(case.backward(y, case.value("dout", y.shape)))
    for name, start in (("rope", 0), ("rope_far", 131000)):
        case = OpCase("rope", name, theta=10000.0)
        positions = case.integer("positions", torch.stack([torch.arange(17) + start, (torch.arange(17) * 7) % 17]))
        y = ref.rope(case.leaf("x", (2, 17, 3, 16)), positions, 10000.0)
        case.output("out", y)
        cases.append(case.backward(y, case.value("dout", y.shape)))

    case = OpCase("gelu", "gelu")
    y = ref.gelu(case.leaf("x", (211,), 16.0))
    case.output("out", y)
    cases.append(case.backward(y, case.value("dout", y.shape)))
    case = OpCase("swiglu", "swiglu")
    y = ref.silu(case.leaf("gate", (211,), 32.0)) * case.leaf("up", (211,), 4.0)
    case.output("out", y)
    cases.append(case.backward(y, case.value("dout", y.shape)))
    return cases


# ---------------------------------------------------------------------------------------------
# The definitions against PyTorch's own ops and against transformers


def expect(what, ours, theirs, tolerance):
    ours, theirs = (torch.as_tensor(x, dtype=torch.float64) for x in (ours, theirs))
    error = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)).item()
    if not error <= tolerance:
        sys.exit(f"{what}: relative difference {error:.3g} is above {tolerance:g}")
    print(f"{what}: relative difference {error:.2g}")


def check_against_torch():
    f = torch.nn.functional
    x, w, b = ref.values("x", (9, 45), 4.0), ref.values("w", (45,), 0.5, 1.0), ref.values("b", (45,), 0.5)
    expect("rms_norm", ref.rms_norm(x, w, 1e-5), f.rms_norm(x, (45,), w, 1e-5), 1e-14)
    expect("layer_norm", ref.layer_norm(x, w, b, 1e-5), f.layer_norm(x, (45,), w, b, 1e-5), 1e-13)
    expect("gelu", ref.gelu(x), f.gelu(x, approximate="tanh"), 1e-14)
    expect("silu", ref.silu(x), f.silu(x), 1e-14)
    labels = ref.integers("labels", (9,), 45)
    labels[4] = -1
    expect("cross_entropy", ref.cross_entropy(x, labels),
           f.cross_entropy(x, labels, ignore_index=-1, reduction="none"), 1e-14)
    q, k, v = ref.values("q", (2, 21, 6, 16), 4.0), ref.values("k", (2, 21, 2, 16), 4.0), ref.values("v", (2, 21, 2, 16), 2.0)
    theirs = f.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), is_causal=True, enable_gqa=True)
    expect("attention", ref.attention(q, k, v)[0], theirs.transpose(1, 2), 1e-13)


def load_transformers(c, p):
    """The transformers model of a case with the same weights, and the map from our names to theirs."""
    import transformers

    if c.family == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=c.vocab, n_positions=c.context, n_embd=c.d_model, n_layer=c.layers, n_head=c.heads,
            n_inner=c.mlp, layer_norm_epsilon=c.eps, bos_token_id=None, eos_token_id=None, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=c.vocab, hidden_size=c.d_model, intermediate_size=c.mlp, num_hidden_layers=c.layers,
            num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, rms_norm_eps=c.eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.theta},
            max_position_embeddings=c.context, tie_word_embeddings=c.tied))
    model = model.double().train()
    theirs = dict(model.named_parameters())
    names = {}  # ours -> (their parameter's name, how to see our tensor in it)

    def plain(ours, name):
        names[ours] = (name, lambda z: z)

    if c.family == "gpt2":
        plain("embed.weight", "transformer.wte.weight")
        plain("position.weight", "transformer.wpe.weight")
        for end in ("weight", "bias"):
            plain(f"norm.{end}", f"transformer.ln_f.{end}")
            for i in range(c.layers):
                a, h = f"blocks.{i}.", f"transformer.h.{i}."
                # Conv1D holds [in, out], and q, k and v side by side.
                turn = (lambda z: z.T) if end == "weight" else (lambda z: z)
                plain(f"{a}attention_norm.{end}", f"{h}ln_1.{end}")
                plain(f"{a}mlp_norm.{end}", f"{h}ln_2.{end}")
                for j, s in enumerate("qkv"):
                    names[f"{a}attention.{s}.{end}"] = (
                        f"{h}attn.c_attn.{end}",
                        lambda z, j=j, turn=turn: turn(z[..., j * c.d_model:(j + 1) * c.d_model]))
                names[f"{a}attention.out.{end}"] = (f"{h}attn.c_proj.{end}", turn)
                names[f"{a}mlp.up.{end}"] = (f"{h}mlp.c_fc.{end}", turn)
                names[f"{a}mlp.down.{end}"] = (f"{h}mlp.c_proj.{end}", turn)
    else:
        plain("embed.weight", "model.embed_tokens.weight")
        plain("norm.weight", "model.norm.weight")
        if not c.tied:
            plain("head.weight", "lm_head.weight")
        for i in range(c.layers):
            a, h = f"blocks.{i}.", f"model.layers.{i}."
            plain(f"{a}attention_norm.weight", f"{h}input_layernorm.weight")
            plain(f"{a}mlp_norm.weight", f"{h}post_attention_layernorm.weight")
            for s in "qkv":
                plain(f"{a}attention.{s}.weight", f"{h}self_attn.{s}_proj.weight")
            plain(f"{a}attention.out.weight", f"{h}self_attn.o_proj.weight")
            for s in ("gate", "up", "down"):
                plain(f"{a}mlp.{s}.weight", f"{h}mlp.{s}_proj.weight")
    if set(names) != set(p) or {n for n, _ in names.values()} != set(theirs):
        sys.exit(f"{c.family}: the parameters of transformers' model are not those of ours")
    with torch.no_grad():
        for ours, (name, view) in names.items():
            view(theirs[name]).copy_(p[ours])
    return model, theirs, names


def check_against_transformers():
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: the models are compared with nothing")
        return
    print("transformers", transformers.__version__)
    for name, case in MODELS.items():
        if "starts" in case:  # its packed attention takes another form; the op is checked apart
            continue
        c = case["config"]
        p = ref.make_parameters(c, torch.float64)
        tokens, labels = batch_of(name, case, 0)
        loss, grads = gradients(c, p, tokens, labels, None)
        model, theirs, names = load_transformers(c, p)
        logits = model(input_ids=tokens, use_cache=False).logits
        their_loss = torch.nn.functional.cross_entropy(logits.reshape(-1, c.vocab), labels.reshape(-1))
        their_loss.backward()
        # transformers' LLaMA computes its norms and rotation angles in f32 whatever the dtype.
        tolerance = 1e-12 if c.family == "gpt2" else 2e-6
        expect(f"{name} loss", loss, their_loss.item(), tolerance)
        scale = total_norm(grads)
        worst = max((grads[k] - view(theirs[n].grad)).abs().max().item() for k, (n, view) in names.items())
        expect(f"{name} gradients", scale + worst, scale, tolerance)


# ---------------------------------------------------------------------------------------------


def differences(path, a, b):
    """Where two files differ: numbers by 1e-10 of the larger, but bf16 by 1e-2 and f32 by 1e-3.
    AdamW moves GPT-2's key biases, whose gradient is zero but for rounding, by that rounding."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for k in a for d in differences(path + [k], a[k], b[k])]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(path + [str(i)], x, y)]
    if isinstance(a, float) and isinstance(b, float):
        tolerance = 1e-2 if "bf16" in path else 1e-3 if "float32" in path else 1e-10
        if abs(a - b) <= tolerance * max(abs(a), abs(b)) + (1e-11 if "adamw" in path else 1e-13):
            return []
    elif a == b:
        return []
    return [f"{'/'.join(path)}: {a} is now {b}"]


def text(x, indent=""):
    """JSON with a line for each entry of the outer levels, so that a change can be read."""
    if isinstance(x, dict) and len(indent) < 6 and not {"l2", "scale"} & x.keys():
        inner = ",\n".join(f"{indent} {json.dumps(k)}: {text(v, indent + ' ')}" for k, v in x.items())
        return "{\n" + inner + "\n" + indent + "}" if x else "{}"
    return json.dumps(x, allow_nan=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    arguments = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    print("torch", torch.__version__)
    check_against_torch()
    check_against_transformers()
    cases = [model_case(n, c) for n, c in MODELS.items()] + op_cases()
    bad = []
    for case in cases:
        path = HERE / f"{case['name']}.json"
        if arguments.check:
            bad += differences([case["name"]], json.loads(path.read_text()), json.loads(json.dumps(case)))
        else:
            path.write_text(text(case) + "\n")
            print(f"{path.name}: {path.stat().st_size} bytes")
    if bad:
        sys.exit("\n".join(bad))
    if arguments.check:
        print(f"{len(cases)} files agree")


if __name__ == "__main__":
    main()
