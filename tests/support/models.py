"""Small decoder graphs in ONNX text, for passes that look at whole blocks."""

DIM, HEADS, KV_HEADS, HEAD, MLP, VOCAB = 8, 4, 2, 4, 12, 16


def block(
    n: int, stream: str, result: str, *, rope: bool = True, gated: bool = True, norm_scale: str = "Gamma"
) -> str:
    """Return one pre-norm decoder block with grouped queries that reads `stream` and writes `result`."""
    p = f"b{n}"
    rotate = (
        f"{p}_q = RotaryEmbedding({p}_q4, cos, sin)\n{p}_k = RotaryEmbedding({p}_k4, cos, sin)"
        if rope
        else f"{p}_q = Identity({p}_q4)\n{p}_k = Identity({p}_k4)"
    )
    mlp = (
        f"{p}_gate = MatMul({p}_n2, W{n}_gate)\n{p}_sig = Sigmoid({p}_gate)\n{p}_silu = Mul({p}_gate, {p}_sig)\n"
        f"{p}_up = MatMul({p}_n2, W{n}_up)\n{p}_act = Mul({p}_silu, {p}_up)"
        if gated
        else f"{p}_up = MatMul({p}_n2, W{n}_up)\n{p}_act = Relu({p}_up)"
    )
    return f"""
    {p}_n1 = RMSNormalization<axis = -1>({stream}, {norm_scale}{n}_a)
    {p}_qf = MatMul({p}_n1, W{n}_q)
    {p}_kf = MatMul({p}_n1, W{n}_k)
    {p}_vm = MatMul({p}_n1, W{n}_v)
    {p}_vf = Add({p}_vm, B{n}_v)
    {p}_qr = Reshape({p}_qf, q_shape)
    {p}_kr = Reshape({p}_kf, kv_shape)
    {p}_vr = Reshape({p}_vf, kv_shape)
    {p}_q4 = Transpose<perm = [0, 2, 1, 3]>({p}_qr)
    {p}_k4 = Transpose<perm = [0, 2, 1, 3]>({p}_kr)
    {p}_v = Transpose<perm = [0, 2, 1, 3]>({p}_vr)
    {rotate}
    present__{n}__key = Concat<axis = 2>(past_key_values__{n}__key, {p}_k)
    present__{n}__value = Concat<axis = 2>(past_key_values__{n}__value, {p}_v)
    {p}_o4 = Attention<scale = 0.5>({p}_q, present__{n}__key, present__{n}__value, mask)
    {p}_ot = Transpose<perm = [0, 2, 1, 3]>({p}_o4)
    {p}_of = Reshape({p}_ot, flat_shape)
    {p}_o = MatMul({p}_of, W{n}_o)
    {p}_mid = Add({stream}, {p}_o)
    {p}_n2 = RMSNormalization<axis = -1>({p}_mid, {norm_scale}{n}_m)
    {mlp}
    {p}_down = MatMul({p}_act, W{n}_down)
    {result} = Add({p}_mid, {p}_down)
"""


def block_weights(n: int) -> str:
    """Return the weights of a block as graph inputs, to be filled at random."""
    q, kv = HEADS * HEAD, KV_HEADS * HEAD
    return f"""float[{DIM}] Gamma{n}_a, float[{DIM},{q}] W{n}_q, float[{DIM},{kv}] W{n}_k, float[{DIM},{kv}] W{n}_v,
    float[{kv}] B{n}_v, float[{q},{DIM}] W{n}_o, float[{DIM}] Gamma{n}_m, float[{DIM},{MLP}] W{n}_gate,
    float[{DIM},{MLP}] W{n}_up, float[{MLP},{DIM}] W{n}_down,
    float[batch,{KV_HEADS},past,{HEAD}] past_key_values__{n}__key, float[batch,{KV_HEADS},past,{HEAD}] past_key_values__{n}__value"""


def decoder(blocks: int = 2, **options: bool) -> str:
    """Return a decoder: embedding, blocks, final norm, head, with a cache."""
    streams = ["block__0__input", *(f"block__{n}__output" for n in range(blocks))]
    body = "".join(block(n, streams[n], streams[n + 1], **options) for n in range(blocks))
    weights = ",\n".join(block_weights(n) for n in range(blocks))
    presents = ", ".join(
        f"float[batch,{KV_HEADS},total,{HEAD}] present__{n}__{kind}"
        for n in range(blocks)
        for kind in ("key", "value")
    )
    return f"""decoder (int64[batch, sequence] input_ids, float[batch, 1, sequence, total] mask,
    float[batch, sequence, {HEAD // 2}] cos, float[batch, sequence, {HEAD // 2}] sin,
    float[{VOCAB},{DIM}] Embedding, float[{DIM}] Gamma_final, float[{DIM},{VOCAB}] Head,
    {weights}) => (float[batch, sequence, {VOCAB}] logits, {presents})
    <int64[4] q_shape = {{0, 0, {HEADS}, {HEAD}}}, int64[4] kv_shape = {{0, 0, {KV_HEADS}, {HEAD}}},
     int64[3] flat_shape = {{0, 0, {HEADS * HEAD}}}>
    {{
    block__0__input = Gather<axis = 0>(Embedding, input_ids)
    {body}
    final = RMSNormalization<axis = -1>(block__{blocks - 1}__output, Gamma_final)
    logits = MatMul(final, Head)
    }}"""
