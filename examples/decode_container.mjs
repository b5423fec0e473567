// Decode an adaptc container in plain JavaScript, written from docs/format.md (and, beside this file, its codecs).
//
//   node examples/decode_container.mjs FILE.adaptc.safetensors

import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { pathToFileURL } from 'node:url'
import { e4m3, factor, fromHalf, toHalf } from './decode_factors.mjs'
import { rd } from './decode_rd.mjs'

const sha256 = data => createHash('sha256').update(data).digest('hex')
const product = shape => shape.reduce((a, b) => a * b, 1)

const TYPED = {
  F64: Float64Array, F32: Float32Array, F16: Uint16Array, BF16: Uint16Array, F8_E4M3: Uint8Array, F8_E5M2: Uint8Array,
  I64: BigInt64Array, I32: Int32Array, I16: Int16Array, I8: Int8Array, U64: BigUint64Array, U32: Uint32Array,
  U16: Uint16Array, U8: Uint8Array, BOOL: Uint8Array,
}
const WIDEN = { F16: fromHalf, F8_E4M3: e4m3, F8_E5M2: c => fromHalf(c << 8),
  BF16: u => new Float32Array(new Uint32Array([u << 16]).buffer)[0] }

// numbers of stored bytes, whatever their alignment
function numbers(raw, dtype) {
  const typed = new TYPED[dtype](raw.slice().buffer)
  return WIDEN[dtype] ? Array.from(typed, WIDEN[dtype]) : typed
}

// [manifest, tensors by name {dtype, shape, data}]; checksums checked, the last tensor may be cut short
export function read(path) {
  const file = new Uint8Array(readFileSync(path)), view = new DataView(file.buffer)
  const start = 8 + Number(view.getBigUint64(0, true))
  const header = JSON.parse(new TextDecoder().decode(file.subarray(8, start)))
  const manifest = JSON.parse(header.__metadata__.adaptc), tensors = new Map()
  if (manifest.format !== 1) throw new Error(`format ${manifest.format}`)
  delete header.__metadata__
  for (const [name, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(header)) {
    const raw = file.subarray(start + begin, start + end)
    const whole = raw.length === end - begin
    if (whole && sha256(raw).slice(0, 16) !== manifest.sums[name]) throw new Error(`${name}: checksum`)
    tensors.set(name, { dtype, shape, data: numbers(raw, dtype) })
  }
  return [manifest, tensors]
}

// what a template stands for
export function names(template) {
  let out = ['']
  for (const [, escaped, body, plain] of template.matchAll(/\\(.)|\{([^{}]*)\}|([^\\{}]+)/gsu)) {
    const ends = /^(\d+)-(\d+)$/.exec(body ?? '')
    const choices = body === undefined ? [escaped ?? plain]
      : ends ? Array.from({ length: ends[2] - ends[1] + 1 }, (_, i) => String(Number(ends[1]) + i)) : body.split(',')
    out = out.flatMap(head => choices.map(choice => head + choice))
  }
  return out
}

// modules as columns of B and rows of A, [b..., a...] a direction
function directions(shapes, config, index, payload) {
  const pairs = new Uint16Array(index.slice().buffer), rows = shapes.map(() => [])
  let at = 0
  for (let c = 0; c < pairs.length; c += 2) {
    const [m, n] = shapes[pairs[c]], end = at + (m + n) * TYPED[config.dtype].BYTES_PER_ELEMENT
    if (end > payload.length) break
    rows[pairs[c]].push([pairs[c + 1], Array.from(numbers(payload.subarray(at, end), config.dtype))])
    at = end
  }
  return rows.map((row, i) => ({
    rows: row.sort((a, b) => a[0] - b[0]).map(([, values]) => values), rowFirst: false,
    scale: Array.isArray(config.scale) ? config.scale[i] : config.scale, dtype: config.dtype,
  }))
}

// {b, a, scale} of directions; `rowFirst`: each is the row of A, then the column of B
function lowRank({ rows, rowFirst, scale, dtype }, [m, n]) {
  const column = r => rowFirst ? r.slice(n) : r.slice(0, m), row = r => rowFirst ? r.slice(0, n) : r.slice(m)
  const r = rows.length, columns = rows.map(column)
  const b = Array.from({ length: m * r }, (_, i) => columns[i % r][Math.floor(i / r)])
  return { b: { dtype, shape: [m, r], data: b }, a: { dtype, shape: [r, n], data: rows.flatMap(row) }, scale }
}

// fields of a form by path, with tensors and multipliers in the places of their numbers
function form(f, held, scales, coded, path = '') {
  if (f.kind === 'coded') return Object.fromEntries(Object.entries(coded).map(([k, v]) => [path + k, v]))
  const out = {}
  if ('scale' in f) out[`${path}scale`] = scales[f.scale]
  for (const field of ['a', 'b', 'core', 'weight', 'indices', 'values']) {
    if (!(field in f)) continue
    const value = f[field]
    if (typeof value === 'number') out[path + field] = held[value]
    else {
      const streams = Object.entries(value.streams)
      const data = factor(value, Object.fromEntries(streams.map(([k, j]) => [k, held[j].data])),
        Object.fromEntries(streams.map(([k, j]) => [k, held[j].shape])))
      out[path + field] = { dtype: value.dtype, shape: value.shape, data }
    }
  }
  for (const [k, j] of Object.entries(f.tensors ?? {})) out[`${path}tensors.${k}`] = held[j]
  const parts = ['left', 'right', 'inner'].filter(side => side in f).map(side => [side, f[side]])
  for (const [k, part] of [...parts, ...Object.entries(f.terms ?? {})]) {
    Object.assign(out, form(part, held, scales, coded, `${path}${k}.`))
  }
  return out
}

// parameter name -> its fields: arrays {dtype, shape, data} and multipliers
export function decode(path) {
  const [manifest, tensors] = read(path), deltas = new Map()
  for (const [i, { codec, modules, config }] of (manifest.codes ?? []).entries()) {
    const flat = ([out, ...rest]) => [out, product(rest)]
    const all = modules.flatMap(([template, shape]) => names(template).map(name => [name, flat(shape)]))
    const made = { directions, rd }[codec](all.map(([, shape]) => shape), config, tensors.get(`index.${i}`).data,
      tensors.get(`payload.${i}`).data)
    all.forEach(([name, shape], j) => deltas.set(name, lowRank(made[j], shape)))
  }
  for (const [i, group] of (manifest.groups ?? []).entries()) {
    const stacked = []
    while (tensors.has(`g${i}.${stacked.length}`)) stacked.push(tensors.get(`g${i}.${stacked.length}`))
    group.modules.flatMap(names).forEach((name, k) => {
      const held = stacked.map(({ dtype, shape: [, ...shape], data }) => (
        { dtype, shape, data: data.slice(k * product(shape), (k + 1) * product(shape)) }))
      const scales = group.scales.map(s => Array.isArray(s) ? s[k] : s), coded = deltas.get(name)
      deltas.delete(name)
      deltas.set(name, form(group.form, held, scales, coded))
    })
  }
  return deltas
}

const NUMPY = { F64: 'float64', F32: 'float32', BF16: 'float32', F16: 'float16', I64: 'int64', I32: 'int32' }

// numpy's dtype, shape and SHA-256 of the bytes of a field, so that decoders can be compared
function digest(value) {
  if (typeof value === 'number') return ['float64', [], sha256(new Float64Array([value]))]
  const { dtype, shape, data } = value
  const typed = dtype === 'F16' ? Uint16Array.from(data, toHalf)
    : (dtype === 'BF16' ? Float32Array : TYPED[dtype]).from(data)
  return [NUMPY[dtype], shape, sha256(typed)]
}

if (import.meta.url === pathToFileURL(process.argv[1]).href) {
  const path = process.argv.at(-1), all = {}
  for (const [name, fields] of decode(path)) {
    for (const [field, value] of Object.entries(fields)) {
      if (process.argv.includes('--digests')) all[`${name}|${field}`] = digest(value)
      else console.log(name, field, typeof value === 'number' ? value : `${value.dtype} ${value.shape.join('x')}`)
    }
  }
  if (process.argv.includes('--digests')) console.log(JSON.stringify(all))
}
