// Decode the codec `rd` in plain JavaScript, written from docs/rd-coding.md.

const RATE = [205, 261, 325, 387, 453, 518, 585, 651, 715, 781, 845, 910, 973, 1038]
const NEXT = [[0, 2], [5, 7], [1, 3], [6, 4], [2, 0], [4, 6], [3, 1], [7, 5]]
const FREQUENCIES = `
4: 986 16 / 194 412 / 780 119
4: 888 65 / 100 459 / 698 160
5: 742 137 / 56 469 12 / 612 198 5
5: 622 193 5 / 30 449 45 / 530 227 17
6: 512 230 22 / 18 411 86 3 / 456 244 36
7: 432 242 47 3 / 10 359 130 14 / 388 246 62 6
8: 360 238 77 12 / 8 312 155 34 3 / 332 238 87 16
9: 302 225 98 29 4 / 8 264 169 58 12 / 280 221 108 32 6
11: 248 205 118 45 12 2 / 4 230 160 80 28 6 / 238 199 119 51 15 3
12: 216 183 122 61 24 7 / 6 189 154 93 45 17 5 / 200 177 123 67 28 9 2
15: 178 157 115 75 41 19 6 2 / 4 161 143 101 56 26 11 4 / 168 154 119 77 42 19 7 2
17: 146 137 112 80 49 29 15 6 2 / 6 137 124 97 67 41 21 9 4 / 144 133 111 81 53 30 15 6 2
20: 128 116 98 79 60 39 23 14 5 3 / 4 113 111 92 69 48 32 18 10 5 2 / 120 114 100 80 59 40 24 14 7 3
23: 106 99 89 74 59 44 32 23 14 8 3 2 / 4 95 95 84 69 56 39 26 15 11 5 3 / 100 97 88 76 61 46 33 22 13 8 4 2`

// [symbol, bits, base] of each of the 1024 coder states
function table(kmax, text) {
  const f = text.trim().split(/ +/).map(Number)
  while (f.length <= kmax) f.push(1)
  const slots = new Array(1024), x = new Map()
  let i = 0
  for (let s = -kmax; s <= kmax; s++) {
    x.set(s, f[Math.abs(s)])
    for (let t = 0; t < f[Math.abs(s)]; t++) slots[(643 * i++) % 1024] = s
  }
  return slots.map(s => {
    const now = x.get(s), bits = 10 - Math.floor(Math.log2(now))
    x.set(s, now + 1)
    return [s, bits, now * 2 ** bits - 1024]
  })
}

const STATES = FREQUENCIES.trim().split('\n').map(row => {
  const [kmax, parts] = row.split(':')
  return parts.split('/').map(part => table(Number(kmax), part))
})

class Bits {
  constructor(data) { this.data = data; this.at = 0 }
  bit() {
    if (this.at >= 8 * this.data.length) throw new Error('bits end early')
    const b = this.data[this.at >> 3] >> (7 - (this.at & 7)) & 1
    this.at++
    return b
  }
  take(n) { let v = 0; while (n--) v = 2 * v + this.bit(); return v }
  rice(k) { let h = 0; while (!this.bit()) h++; return h * 2 ** k + this.take(k) }
  signed(k) { const z = this.rice(k); return z % 2 ? -(z + 1) / 2 : z / 2 }
}

// line of the tables, and raw bits of a sample, for class c
const line = c => c < 14 ? [c, 0] : [10 + (c - 14) % 4, Math.floor((c - 10) / 4)]

// the streams of a direction, each a list of runs [class, number of samples]
function streams(m, n, u, v) {
  if (m + n <= 4096) return [[[v, n], [u, m]]]
  const out = []
  for (const [c, size] of [[v, n], [u, m]]) {
    const parts = Math.ceil(size / 4096)
    for (let i = 0; i < parts; i++) out.push([[c, Math.floor((i + 1) * size / parts) - Math.floor(i * size / parts)]])
  }
  return out
}

function entries(data, runs) {
  const bits = new Bits(data), out = []
  let left = runs.reduce((sum, [, count]) => sum + count, 0), x = bits.take(10)
  for (const [c, count] of runs) {
    const [row, raw] = line(c)
    let t = 0
    for (let i = 0; i < count; i++) {
      let [k, width, base] = STATES[row][raw ? 2 : t % 2][x]
      if (--left) x = base + bits.take(width)
      if (raw) k = k * 2 ** raw + bits.take(raw) - 2 ** (raw - 1)
      out.push(2 * k - Math.sign(k) * (t % 2))
      t = NEXT[t][Math.abs(k % 2)]
    }
  }
  if (Math.ceil(bits.at / 8) !== data.length) throw new Error('a stream does not end within its last byte')
  return out
}

// rows of every module: arrays of float32 [q..., p...] already multiplied; `shapes` are [m, n]
export function rd(shapes, config, index, payload) {
  const bits = new Bits(index), [precision, kCount, kV, kU, kE, kLength] = [0, 0, 0, 0, 0, 0].map(() => bits.take(4))
  const found = [], rows = shapes.map(() => [])
  let v = 0, difference = 0, e = 0, at = 0
  shapes.forEach(([m, n], j) => {
    let first
    for (let left = bits.rice(kCount); left > 0; left--) {
      v -= bits.signed(kV)
      difference += bits.signed(kU)
      e += bits.signed(kE)
      const u = v + difference, mantissa = 2 ** precision + bits.take(precision), parts = []
      for (const runs of streams(m, n, u, v)) {
        const cost = runs.reduce((sum, [c, count]) => sum + count * (RATE[line(c)[0]] + 256 * line(c)[1]), 0)
        parts.push([runs, Math.floor(cost / 2048) + 1 + bits.signed(kLength)])
      }
      found.push({ d: found.length, j, u, v, e, mantissa, parts })
      first ??= [v, e]
    }
    if (first) [v, e] = first
  })
  for (const { d, j, e, mantissa, parts } of [...found].sort((a, b) => b.u + b.v - a.u - a.v || a.d - b.d)) {
    if (at + parts.reduce((sum, [, length]) => sum + length, 0) > payload.length) break
    const all = [], n = shapes[j][1], h = Math.floor((e + precision) / 2)
    for (const [runs, length] of parts) {
      all.push(...entries(payload.subarray(at, at + length), runs))
      at += length
    }
    const low = Math.fround(mantissa * 2 ** (e - h)), high = Math.fround(2 ** h)
    rows[j].push([d, all.map((value, i) => Math.fround(value * (i < n ? high : low)))])
  }
  const sorted = row => row.sort((a, b) => a[0] - b[0]).map(([, values]) => values)
  return rows.map(row => ({ rows: sorted(row), rowFirst: true, scale: 1, dtype: 'F32' }))
}
