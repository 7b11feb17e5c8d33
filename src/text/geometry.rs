//! PostGIS: its binary form in hexadecimal (EWKB) to GeoJSON.

use super::scalar::hex_digit;
use super::string::write_string;

/// The reference system of GeoJSON: longitude and latitude.
const WGS84: u32 = 4326;
/// Collections in collections: a thread's stack has an end.
const DEEPEST: u32 = 32;

const HAS_Z: u32 = 0x8000_0000;
const HAS_M: u32 = 0x4000_0000;
const HAS_SRID: u32 = 0x2000_0000;

const POINT: u32 = 1;
const LINE: u32 = 2;
const POLYGON: u32 = 3;
const COLLECTION: u32 = 7;

/// A GeoJSON object for a geometry in longitude and latitude (SRID 4326), null for an empty point. Any other text
/// becomes a string: coordinates of another system mean nothing as GeoJSON, and curves it does not have.
pub(super) fn write(out: &mut Vec<u8>, text: &[u8]) {
    let start = out.len();
    let shape = bytes(text).and_then(|bytes| {
        let mut reader = Reader { rest: &bytes, little: true, dimensions: 2, srid: None, empty_point: false };
        reader.geometry(out, 0)?;
        (reader.srid == Some(WGS84) && reader.rest.is_empty()).then_some(reader.empty_point)
    });
    if shape == Some(false) {
        return;
    }
    out.truncate(start);
    if shape.is_none() {
        write_string(out, text);
    } else {
        out.extend_from_slice(b"null");
    }
}

fn bytes(hex: &[u8]) -> Option<Vec<u8>> {
    let (pairs, odd) = hex.as_chunks::<2>();
    if !odd.is_empty() {
        return None;
    }
    pairs.iter().map(|[high, low]| Some(hex_digit(*high)? << 4 | hex_digit(*low)?)).collect()
}

struct Reader<'a> {
    rest: &'a [u8],
    little: bool,
    /// Of each position, the measure included.
    dimensions: usize,
    srid: Option<u32>,
    /// A coordinate is no number: so PostGIS writes a point without a place.
    empty_point: bool,
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.rest.split_first_chunk::<N>()?;
        self.rest = rest;
        Some(*taken)
    }

    fn number(&mut self) -> Option<u32> {
        let bytes = self.take()?;
        Some(if self.little { u32::from_le_bytes(bytes) } else { u32::from_be_bytes(bytes) })
    }

    /// Reads the head of a geometry; gives its kind, and whether positions have a height.
    fn head(&mut self) -> Option<(u32, bool)> {
        self.little = match self.take()? {
            [0] => false,
            [1] => true,
            _ => return None,
        };
        let kind = self.number()?;
        if kind & HAS_SRID != 0 {
            self.srid = Some(self.number()?);
        }
        self.dimensions = 2 + usize::from(kind & HAS_Z != 0) + usize::from(kind & HAS_M != 0);
        Some((kind & !(HAS_Z | HAS_M | HAS_SRID), kind & HAS_Z != 0))
    }

    fn geometry(&mut self, out: &mut Vec<u8>, depth: u32) -> Option<()> {
        let (kind, height) = self.head()?;
        let name: &[u8] = match kind {
            POINT => b"Point",
            LINE => b"LineString",
            POLYGON => b"Polygon",
            4 => b"MultiPoint",
            5 => b"MultiLineString",
            6 => b"MultiPolygon",
            COLLECTION => b"GeometryCollection",
            _ => return None,
        };
        out.extend_from_slice(b"{\"type\":\"");
        out.extend_from_slice(name);
        out.extend_from_slice(if kind == COLLECTION { b"\",\"geometries\":" } else { b"\",\"coordinates\":" });
        match kind {
            POINT | LINE | POLYGON => self.coordinates(out, kind, height)?,
            COLLECTION if depth >= DEEPEST => return None,
            COLLECTION => self.list(out, |reader, out| reader.geometry(out, depth + 1))?,
            // A list of geometries with heads of their own, of which only the coordinates are wanted.
            _ => self.list(out, |reader, out| {
                let (part, height) = reader.head()?;
                (part == kind - 3).then_some(())?;
                reader.coordinates(out, part, height)
            })?,
        }
        out.push(b'}');
        Some(())
    }

    fn coordinates(&mut self, out: &mut Vec<u8>, kind: u32, height: bool) -> Option<()> {
        match kind {
            POINT => self.position(out, height),
            LINE => self.list(out, |reader, out| reader.position(out, height)),
            _ => self.list(out, |reader, out| reader.list(out, |reader, out| reader.position(out, height))),
        }
    }

    fn list(&mut self, out: &mut Vec<u8>, mut each: impl FnMut(&mut Self, &mut Vec<u8>) -> Option<()>) -> Option<()> {
        out.push(b'[');
        // Each takes bytes, so that a count that lies ends with them.
        for at in 0..self.number()? {
            if at > 0 {
                out.push(b',');
            }
            each(self, out)?;
        }
        out.push(b']');
        Some(())
    }

    /// GeoJSON has no measure.
    fn position(&mut self, out: &mut Vec<u8>, height: bool) -> Option<()> {
        for at in 0..self.dimensions {
            let bytes = self.take()?;
            let value = if self.little { f64::from_le_bytes(bytes) } else { f64::from_be_bytes(bytes) };
            if at < 2 || at == 2 && height {
                self.empty_point |= !value.is_finite();
                out.push(if at == 0 { b'[' } else { b',' });
                serde_json::to_writer(&mut *out, &value).ok()?;
            }
        }
        out.push(b']');
        Some(())
    }
}
