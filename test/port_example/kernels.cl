// The kernels of opencl.c. Each gets the activations, the weights and local scratch, then numbers: where its operands
// begin, out, x... in `a` and w_... in `w`, with -1 for none, and sizes. All matrices are row-major. GROUP work-items
// make a group; none of this knows how many of them a device runs in lockstep.

// The sum of x over the group, or with `largest` its maximum, in all work-items; s has room for GROUP
float group_reduce(local float *s, float x, int largest) {
    int i = get_local_id(0);
    s[i] = x;
    for (int reach = GROUP / 2; reach > 0; reach /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (i < reach) s[i] = largest ? fmax(s[i], s[i + reach]) : s[i] + s[i + reach];
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    x = s[0];
    barrier(CLK_LOCAL_MEM_FENCE); // all have read before the next call writes
    return x;
}

// out (M,N) = x (M,K)·w^T + bias + add: w (N,K) with row stride ldw, bias (N); row i takes row i % add_rows of add. A
// group of TILE x TILE work-items makes a tile of `out`, an element each, from tiles in local memory.
kernel void linear(global float *a, global const float *w, local float *s, long out, long x, long w_weight, long ldw,
                   long w_bias, long add, long add_rows, long M, long N, long K) {
    local float xs[TILE][TILE], ws[TILE][TILE + 1];
    long tiles = (N + TILE - 1) / TILE, i0 = get_group_id(0) / tiles * TILE, j0 = get_group_id(0) % tiles * TILE;
    int row = get_local_id(0) / TILE, column = get_local_id(0) % TILE;
    long i = i0 + row, j = j0 + column;
    float sum = 0;
    for (long k0 = 0; k0 < K; k0 += TILE) {
        long k = k0 + column;
        xs[row][column] = i < M && k < K ? a[x + i * K + k] : 0;
        ws[row][column] = j0 + row < N && k < K ? w[w_weight + (j0 + row) * ldw + k] : 0;
        barrier(CLK_LOCAL_MEM_FENCE);
        for (int q = 0; q < TILE; q++) sum += xs[row][q] * ws[column][q];
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    if (i >= M || j >= N) return;
    if (w_bias >= 0) sum += w[w_bias + j];
    if (add >= 0) sum += a[add + i % add_rows * N + j];
    a[out + i * N + j] = sum;
}

// out (B,T,D) = LN(x)·(1+scale)+shift, a group a row; picture 0's shift (D) and scale (D) stand at mod, the next
// picture's `stride` further.
kernel void layernorm_modulate(global float *a, global const float *w, local float *s, long out, long x, long mod,
                               long stride, long T, long D) {
    long row = get_group_id(0), shift = mod + row / T * stride, scale = shift + D;
    float sum = 0, var = 0;
    for (long d = get_local_id(0); d < D; d += GROUP) sum += a[x + row * D + d];
    float mean = group_reduce(s, sum, 0) / D;
    for (long d = get_local_id(0); d < D; d += GROUP) var += (a[x + row * D + d] - mean) * (a[x + row * D + d] - mean);
    float rstd = 1 / sqrt(group_reduce(s, var, 0) / D + 1e-6f);
    for (long d = get_local_id(0); d < D; d += GROUP)
        a[out + row * D + d] = (a[x + row * D + d] - mean) * rstd * (1 + a[scale + d]) + a[shift + d];
}

// out (B,T,D) and lse (B,H,T), log2 of the sum of exponentials, from qkv (B,T,3D). A group a row of a head, whose T scores
// stay in local memory.
kernel void attention(global float *a, global const float *w, local float *s, long out, long lse, long qkv, long T,
                      long D, long H) {
    long row = get_group_id(0), i = row % T, h = row / T % H, b = row / T / H, hd = D / H;
    long q = qkv + (b * T + i) * 3 * D + h * hd, k = qkv + b * T * 3 * D + D + h * hd, v = k + D;
    local float *p = s + GROUP;
    float largest = -INFINITY, sum = 0;
    for (long j = get_local_id(0); j < T; j += GROUP) {
        float dot = 0;
        for (long d = 0; d < hd; d++) dot += a[q + d] * a[k + j * 3 * D + d];
        p[j] = dot / sqrt((float)hd);
        largest = fmax(largest, p[j]);
    }
    largest = group_reduce(s, largest, 1);
    for (long j = get_local_id(0); j < T; j += GROUP) {
        p[j] = exp(p[j] - largest);
        sum += p[j];
    }
    sum = group_reduce(s, sum, 0); // its barriers also show all of p to all
    for (long d = get_local_id(0); d < hd; d += GROUP) {
        float value = 0;
        for (long j = 0; j < T; j++) value += p[j] * a[v + j * 3 * D + d];
        a[out + (b * T + i) * D + h * hd + d] = value / sum;
    }
    if (get_local_id(0) == 0) a[lse + row] = largest * M_LOG2E_F + log2(sum);
}

// out = gelu(x) in its tanh form, an element a work-item
kernel void gelu(global float *a, global const float *w, local float *s, long out, long x, long count) {
    long i = get_global_id(0);
    if (i >= count) return;
    float v = a[x + i];
    a[out + i] = v / (1 + exp(-1.5957691216f * v * (1 + 0.044715f * v * v)));
}

// out (B,T,D) = x + gate·branch; gate (D) of the first picture, the next picture's `stride` further
kernel void gated_residual(global float *a, global const float *w, local float *s, long out, long x, long gate,
                           long stride, long branch, long T, long D, long count) {
    long i = get_global_id(0);
    if (i < count) a[out + i] = a[x + i] + a[gate + i / (T * D) * stride + i % D] * a[branch + i];
}

// out += x
kernel void add(global float *a, global const float *w, local float *s, long out, long x, long count) {
    long i = get_global_id(0);
    if (i < count) a[out + i] += a[x + i];
}

// Between pictures (B,C,S,S) and tokens (B,T,p·p·C); a token is (channel, row, column) on the way there, and on the way
// back, with to_picture, (row, column, channel).
kernel void patches(global float *a, global const float *w, local float *s, long tokens, long pictures, long to_picture,
                    long C, long S, long p, long count) {
    long i = get_global_id(0), column = i % S, row = i / S % S, c = i / S / S % C, b = i / S / S / C;
    if (i >= count) return;
    long token = (b * (S / p) + row / p) * (S / p) + column / p, inside = row % p * p + column % p;
    long at = tokens + token * C * p * p + (to_picture ? inside * C + c : c * p * p + inside);
    if (to_picture)
        a[pictures + i] = a[at];
    else
        a[at] = a[pictures + i];
}
