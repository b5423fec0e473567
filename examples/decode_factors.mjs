// Decode codes of single factors in plain JavaScript, written from docs/format.md.

const LEVELS = [-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
  -0.18477343022823334, -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
  0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1].map(Math.fround)
const MAP = [0, 1]
for (let i = 0; i < 7; i++) {
  for (let k = 0; k < 2 ** i; k++) {
    const step = (0.1 + 0.9 * (k + 0.5) / 2 ** i) * Number(`1e${i - 6}`)
    MAP.push(Math.fround(step), -Math.fround(step))
  }
}
MAP.sort((a, b) => a - b)
const f = Math.fround

export function e4m3(c) {
  const exponent = c >> 3 & 15, fraction = exponent ? 8 + (c & 7) : c & 7
  return (c > 127 ? -1 : 1) * fraction * 2 ** (Math.max(exponent, 1) - 10)
}

export function fromHalf(h) {
  const exponent = h >> 10 & 31, fraction = h & 1023, sign = h >> 15 ? -1 : 1
  if (exponent === 31) return fraction ? NaN : sign * Infinity
  return sign * (exponent ? 1024 + fraction : fraction) * 2 ** (Math.max(exponent, 1) - 25)
}

// x to the nearest multiple of 2^-digits below its leading bit, ties to even, no finer than 2^smallest
function nearest(x, digits, smallest) {
  if (!Number.isFinite(x) || x === 0) return x
  const unit = 2 ** Math.max(Math.floor(Math.log2(Math.abs(x))) - digits, smallest), q = x / unit, low = Math.floor(q)
  const up = q - low > 0.5 || (q - low === 0.5 && low % 2 !== 0)
  return (low + (up ? 1 : 0)) * unit
}

export function toHalf(x) {
  const y = nearest(x, 10, -24), sign = y < 0 || Object.is(y, -0) ? 0x8000 : 0, size = Math.abs(y)
  if (Number.isNaN(size)) return 0x7e00
  if (size >= 65520) return sign | 0x7c00
  const exponent = size < 2 ** -14 ? -15 : Math.floor(Math.log2(size))
  return sign | (exponent === -15 ? size * 2 ** 24 : (exponent + 15) * 1024 + (size * 2 ** (10 - exponent) - 1024))
}

// to float32, and from there to a narrower type (halves by toHalf when they are stored)
export const rounded = (x, dtype) => dtype === 'F64' ? x : dtype === 'BF16' ? nearest(f(x), 7, -133) : f(x)

const density = x => Math.exp(-x * x / 2) / Math.sqrt(2 * Math.PI)
function cdf(x) { // series of Abramowitz and Stegun 26.2.11
  let term = x, sum = x
  for (let k = 1; Math.abs(term) > 1e-18 && k < 200; k++) sum += term *= x * x / (2 * k + 1)
  return 0.5 + density(x) * sum
}
function icdf(p, x) { // Newton from a guess
  for (let i = 0; i < 60; i++) {
    const step = (cdf(x) - p) / density(x)
    x -= Math.max(-0.5, Math.min(0.5, step))
    if (Math.abs(step) < 1e-15) break
  }
  return x
}
function book(n) {
  let v = Array.from({ length: n }, (_, i) => icdf((i + 0.5) / n, 0))
  for (let turn = 0; turn < 500; turn++) {
    const p = [0, ...v.slice(1).map((b, i) => cdf((v[i] + b) / 2)), 1]
    v = v.map((now, i) => icdf((p[i] + p[i + 1]) / 2, now))
  }
  return v.map((x, i) => f((x - v[n - 1 - i]) / 2))
}

// code t of width w: bits t w .. (t + 1) w - 1, the lowest bit of a byte first
const unpacked = (data, w, n) => Array.from({ length: n }, (_, t) => {
  let code = 0
  for (let i = 0; i < w; i++) code |= (data[(t * w + i) >> 3] >> ((t * w + i) & 7) & 1) << i
  return code
})

// float32 values of a matrix coded row by row
function matrix(codec, config, s, rows, columns) {
  const n = rows * columns
  if (codec === 'fp8') return Array.from(s.codes, (c, i) => f(e4m3(c) * s.scale[Math.floor(i / columns)]))
  if (codec === 'nf4') {
    const block = Array.from(s.absmax, (a, i) => f(f(MAP[a] * s.scale[i >> 8]) + s.offset[0]))
    const code = i => i % 2 ? s.codes[i >> 1] & 15 : s.codes[i >> 1] >> 4
    return Array.from({ length: n }, (_, i) => f(LEVELS[code(i)] * block[i >> 6]))
  }
  const codes = unpacked(s.codes, config.width, n)
  if (codec === 'bilora') {
    const levels = book(2 ** config.width)
    return codes.map(c => f(f(levels[c] * s.moments[1]) + s.moments[0]))
  }
  const groups = Math.ceil(columns / config.group)
  return codes.map((c, i) => {
    const g = Math.floor(i / columns) * groups + Math.floor(i % columns / config.group)
    return f(s.low[g] + f(s.step[g] * c))
  })
}

// float64 values of a factor or weight (m, n) of coefficients; `shapes` are those of the streams
function weight(codec, s, shapes, m, n) {
  const out = new Float64Array(m * n)
  const each = value => { for (let i = 0; i < m * n; i++) out[i] = value(Math.floor(i / n), i % n); return out }
  const sum = (count, term) => { let total = 0; for (let k = 0; k < count; k++) total += term(k); return total }
  if (codec === 'tucker') {
    const [, q, ...kernel] = shapes.mid, size = kernel.reduce((a, b) => a * b, 1), inputs = shapes.down[1]
    return each((p, c) => sum(q, k => s.mid[(p * q + k) * size + c % size] * s.down[k * inputs + Math.floor(c / size)]))
  }
  if (codec === 'lines') {
    const [rows, cols] = [s.rows || [...Array(m).keys()], s.cols || [...Array(n).keys()]].map(x => Array.from(x, Number))
    rows.forEach((i, p) => cols.forEach((j, q) => { out[i * n + j] = s.values[p * cols.length + q] }))
    return out
  }
  if (codec === 'circulant') {
    const [, q, b] = shapes.kernel
    return each((i, j) => s.kernel[(Math.floor(i / b) * q + Math.floor(j / b)) * b + (j % b - i % b + b) % b] / n)
  }
  if (codec === 'randlora') {
    const [r, short] = shapes.a, [, bases] = shapes.b, lambda = s.lambda
    const entry = (i, t) => sum(r * bases, c => {
      const k = Math.floor(c / bases), base = c % bases // column c of L is base c / r, but rows of R run rank by rank
      return s.b[i * bases * r + c] * (lambda[k * bases + base] * s.a[k * short + t] * s.gamma[base * short + t])
    })
    return each((i, j) => n === short ? entry(i, j) : entry(j, i))
  }
  const places = Array.from(s.indices, Number)
  if (codec === 'fourier') {
    return each((i, j) => sum(places.length, k => {
      const turn = Math.floor(places[k] / n) * i % m / m + places[k] % n * j % n / n
      return s.values[k] * Math.cos(2 * Math.PI * turn)
    }) / (m * n))
  }
  const spectrum = new Float64Array(m * n)
  places.forEach((at, k) => { spectrum[at] = s.values[k] })
  return each((i, j) => {
    const at = (i >> 1) * n + (j >> 1), right = n / 2, below = m / 2 * n
    const [a, h, v, d] = [spectrum[at], spectrum[at + right], spectrum[at + below], spectrum[at + below + right]]
    const x = j % 2 ? -1 : 1, y = i % 2 ? -1 : 1 // signs of (A H V D): ++++, ++--, +-+-, +--+
    return (a + y * h + x * v + x * y * d) / 2
  })
}

// rising positions from their gaps, block by block
function golomb({ span }, { table, bits }) {
  const bit = i => bits[i >> 3] >> (i & 7) & 1, made = []
  for (let block = 0, start = 0; 3 * block < table.length; block++) {
    const [count, modulus, size] = table.slice(3 * block, 3 * block + 3), k = 31 - Math.clz32(modulus)
    const cut = 2 ** (k + 1) - modulus, gaps = new Array(count).fill(0)
    let at = 8 * start, place = block * span - 1
    for (let i = 0; i < count; i++) for (let j = 0; j < k; j++) gaps[i] += bit(at++) * 2 ** j
    const quotients = gaps.map(() => { let q = 0; while (!bit(at++)) q++; return q })
    gaps.forEach((head, i) => {
      const r = head < cut ? head : 2 * head + bit(at++) - cut
      place += quotients[i] * modulus + r + 1
      made.push(BigInt(place))
    })
    start += size
  }
  return made
}

// values, row by row, of the codes {codec, config, shape, dtype} with streams and their shapes by name
export function factor({ codec, config, shape: [m, n], dtype }, s, shapes) {
  let values
  if (codec === 'golomb') return golomb(config, s)
  if (!('transpose' in config)) values = weight(codec, s, shapes, m, n)
  else if (!config.transpose) values = matrix(codec, config, s, m, n)
  else {
    const turned = matrix(codec, config, s, n, m)
    values = turned.map((_, i) => turned[i % n * m + Math.floor(i / n)])
  }
  return Array.from(values, x => rounded(x, dtype))
}
