//! Writes the golden shards of tests/convert/test_tensorport.py with the serializers that TensorPort uses.
//!
//!     cargo run --release -- OUT
//!
//! TensorPort (github.com/atsentia/tensorport, MIT) is no crate on the index, so its writers are not called here. What
//! decides the bytes is: rmp-serde of a map of (shape, dtype, data) structs, serde-pickle of a map of such structs whose
//! data are byte lists, and a .npy header padded one byte too far. The structs below are declared as its are. Its maps
//! are HashMaps, whose order is random; the map here is sorted, so that a rerun gives the same bytes.

use byteorder::{LittleEndian, WriteBytesExt};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs::{create_dir_all, write};
use std::path::Path;

#[derive(Serialize)]
enum Data {
    Float16(Vec<u16>),
    Float32(Vec<f32>),
    Uint8(Vec<u8>),
    Int64(Vec<i64>),
}

#[derive(Serialize)]
struct Packed {
    shape: Vec<usize>,
    dtype: String,
    data: Data,
}

#[derive(Serialize)]
struct Pickled {
    shape: Vec<usize>,
    dtype: String,
    data: Vec<u8>,
}

impl Packed {
    fn new(shape: &[usize], data: Data) -> Self {
        let dtype = match data {
            Data::Float16(_) => "float16",
            Data::Float32(_) => "float32",
            Data::Uint8(_) => "uint8",
            Data::Int64(_) => "int64",
        };
        Packed { shape: shape.to_vec(), dtype: dtype.to_string(), data }
    }

    fn bytes(&self) -> Vec<u8> {
        match &self.data {
            Data::Float16(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Data::Float32(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Data::Uint8(values) => values.clone(),
            Data::Int64(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }

    fn pickled(&self) -> Pickled {
        Pickled { shape: self.shape.clone(), dtype: self.dtype.clone(), data: self.bytes() }
    }

    fn npy(&self) -> Vec<u8> {
        let descr = match self.dtype.as_str() {
            "float16" => "<f2",
            "float32" => "<f4",
            "uint8" => "|u1",
            _ => "<i8",
        };
        let sizes: Vec<String> = self.shape.iter().map(|size| size.to_string()).collect();
        let comma = if self.shape.len() == 1 { "," } else { "" };
        let text = format!(
            "{{'descr': '{}', 'fortran_order': False, 'shape': ({}{}), }}",
            descr,
            sizes.join(", "),
            comma
        );
        // The newline comes after the padding to 64 and is not part of it: the data begin at 64k + 1.
        let padding = (64 - (10 + text.len()) % 64) % 64;
        let mut file = b"\x93NUMPY\x01\x00".to_vec();
        file.write_u16::<LittleEndian>((text.len() + padding + 1) as u16).unwrap();
        file.extend_from_slice(text.as_bytes());
        file.extend(std::iter::repeat(b' ').take(padding));
        file.push(b'\n');
        file.extend(self.bytes());
        file
    }
}

fn main() {
    let out = std::env::args().nth(1).expect("the folder to write");
    let out = Path::new(&out);
    let f32s = vec![0.0, -0.0, 1.5, -3.25e38, f32::MIN_POSITIVE, f32::INFINITY];
    let i64s = vec![0, 1, 127, 128, 255, 256, 65535, 65536, 1 << 32, i64::MAX, -1, -32, -33, -129, -32769, i64::MIN];
    let tensors: BTreeMap<String, Packed> = [
        // Every second bit pattern of 16 bits up to 2,998 and the last ones: more than one batch of a pickled list.
        ("a.float16", Packed::new(&[2, 752], Data::Float16((0..1500).map(|i| 2 * i).chain(65532..=65535).collect()))),
        ("b.float32", Packed::new(&[3, 2], Data::Float32(f32s))),
        ("c.uint8", Packed::new(&[4, 2, 64], Data::Uint8((0..512).map(|i| i as u8).collect()))),
        ("d.int64", Packed::new(&[16], Data::Int64(i64s))),
        ("e.thousand", Packed::new(&[1000], Data::Uint8(vec![204; 1000]))),
        ("f.scalar", Packed::new(&[], Data::Float32(vec![7.0]))),
    ]
    .into_iter()
    .map(|(name, tensor)| (name.to_string(), tensor))
    .collect();

    create_dir_all(out).unwrap();
    write(out.join("shard_000.msgpack"), rmp_serde::to_vec(&tensors).unwrap()).unwrap();
    let pickled: BTreeMap<&String, Pickled> = tensors.iter().map(|(name, t)| (name, t.pickled())).collect();
    write(out.join("shard_000.pkl"), serde_pickle::to_vec(&pickled, Default::default()).unwrap()).unwrap();
    for (name, tensor) in &tensors {
        write(out.join(format!("{}.npy", name.replace('.', "_"))), tensor.npy()).unwrap();
    }
}
