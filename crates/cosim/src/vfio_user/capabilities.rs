//! The JSON of VERSION: what the peer can do, and what we say we can.

use serde::Serialize;
use serde_json::{Map, Value};

use super::connection::Limits;

/// Longest JSON text read from a peer; QEMU sends about 200 bytes.
pub(super) const MAX_JSON: usize = 4096;

/// What the peer said in VERSION, with the specification's defaults for what it did not say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerVersion {
    /// Proposed major version: 0.
    pub major: u16,
    /// Proposed minor version.
    pub minor: u16,
    /// File descriptors the peer takes in one message.
    pub max_msg_fds: u64,
    /// Most data the peer takes in one message.
    pub max_data_xfer_size: u64,
    /// Most DMA maps at a time.
    pub max_dma_maps: u64,
    /// Page sizes of DMA maps, or'ed together.
    pub pgsizes: u64,
    /// The peer can batch posted writes (REGION_WRITE_MULTI).
    pub write_multiple: bool,
    /// The peer could take our requests on a second socket.
    pub twin_socket: bool,
}

#[derive(Serialize)]
struct Answer {
    capabilities: Answered,
}

#[derive(Serialize)]
struct Answered {
    max_msg_fds: u64,
    max_data_xfer_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_dma_maps: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pgsizes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    write_multiple: Option<bool>,
}

/// Reads the data after the version numbers: nothing, or JSON with a terminating NUL.
pub(super) fn parse(major: u16, minor: u16, data: &[u8]) -> Result<(PeerVersion, Offered), &'static str> {
    let text = match data.split_last() {
        None => &b"{}"[..],
        Some((0, text)) => text,
        Some(_) => return Err("version data without a terminating NUL"),
    };
    if text.len() > MAX_JSON {
        return Err("version data longer than 4096 bytes");
    }
    let whole = match text.is_empty() {
        true => Map::new(),
        false => object(serde_json::from_slice(text).map_err(|_| MALFORMED)?)?,
    };
    let caps = whole.get("capabilities").cloned().map_or(Ok(Map::new()), object)?;
    let twin = caps.get("twin_socket").cloned().map_or(Ok(Map::new()), object)?;
    let offered = Offered {
        max_dma_maps: caps.contains_key("max_dma_maps"),
        pgsizes: caps.contains_key("pgsizes"),
        write_multiple: flag(&caps, "write_multiple")?,
    };
    let peer = PeerVersion {
        major,
        minor,
        max_msg_fds: number(&caps, "max_msg_fds", 1)?,
        max_data_xfer_size: number(&caps, "max_data_xfer_size", 1 << 20)?,
        max_dma_maps: number(&caps, "max_dma_maps", 65535)?,
        pgsizes: number(&caps, "pgsizes", 4096)?,
        write_multiple: offered.write_multiple,
        twin_socket: flag(&twin, "supported")?,
    };
    Ok((peer, offered))
}

const MALFORMED: &str = "version data are not the JSON of the specification";

fn object(value: Value) -> Result<Map<String, Value>, &'static str> {
    match value {
        Value::Object(members) => Ok(members),
        _ => Err(MALFORMED),
    }
}

fn number(members: &Map<String, Value>, name: &str, default: u64) -> Result<u64, &'static str> {
    members.get(name).map_or(Ok(default), |value| value.as_u64().ok_or(MALFORMED))
}

fn flag(members: &Map<String, Value>, name: &str) -> Result<bool, &'static str> {
    members.get(name).map_or(Ok(false), |value| value.as_bool().ok_or(MALFORMED))
}

/// Which optional capabilities the peer named: the answer must be a subset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offered {
    max_dma_maps: bool,
    pgsizes: bool,
    write_multiple: bool,
}

/// Our JSON, with its NUL. Shorter than any proposal that names the same capabilities: QEMU reads the reply into the buffer
/// of its request.
pub(super) fn answer(offered: Offered, limits: &Limits) -> Vec<u8> {
    let answer = Answer {
        capabilities: Answered {
            max_msg_fds: limits.max_msg_fds as u64,
            max_data_xfer_size: limits.max_data_xfer_size as u64,
            max_dma_maps: offered.max_dma_maps.then_some(limits.max_dma_maps as u64),
            pgsizes: offered.pgsizes.then_some(4096),
            write_multiple: offered.write_multiple.then_some(true),
        },
    };
    // Plain numbers cannot fail to serialise.
    let mut text = serde_json::to_vec(&answer).unwrap_or_else(|_| b"{}".to_vec());
    text.push(0);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_said_has_the_default_of_the_specification() {
        for data in [&b""[..], b"\0", b"{}\0", b"{\"capabilities\":{}}\0"] {
            let (peer, _) = parse(0, 0, data).unwrap();
            assert_eq!((peer.max_msg_fds, peer.max_data_xfer_size), (1, 1 << 20));
            assert_eq!((peer.max_dma_maps, peer.pgsizes, peer.write_multiple), (65535, 4096, false));
        }
    }

    #[test]
    fn answer_names_only_what_was_proposed() {
        let (_, offered) = parse(0, 0, b"{\"capabilities\":{\"write_multiple\":true}}\0").unwrap();
        let text = answer(offered, &Limits::default());
        assert_eq!(
            text,
            b"{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":1048576,\"write_multiple\":true}}\0"
        );
        let (_, offered) = parse(0, 0, b"").unwrap();
        assert!(!String::from_utf8(answer(offered, &Limits::default())).unwrap().contains("write_multiple"));
    }

    #[test]
    fn answer_fits_the_buffer_qemu_reads_it_into() {
        let proposal = b"{\"capabilities\": {\"migration\": {\"max_bitmap_size\": 268435456, \"pgsize\": 4096}, \
            \"max_msg_fds\": 16, \"max_data_xfer_size\": 1048576, \"pgsizes\": 4096, \"max_dma_maps\": 65535, \
            \"write_multiple\": true}}\0";
        let (peer, offered) = parse(0, 0, proposal).unwrap();
        assert!(peer.write_multiple && peer.max_msg_fds == 16);
        assert!(answer(offered, &Limits::default()).len() <= proposal.len());
    }

    #[test]
    fn malformed_data_is_refused() {
        let deep = [vec![b'['; 4000], vec![0]].concat();
        let long = [vec![b' '; MAX_JSON + 1], vec![0]].concat();
        for data in [
            &b"{}"[..],
            b"{\0",
            b"[]\0",
            b"{\"capabilities\":[1]}\0",
            b"{\"capabilities\":{\"twin_socket\":1}}\0",
            &deep,
            &long,
        ] {
            assert!(parse(0, 0, data).is_err(), "{data:?}");
        }
        for wrong in ["\"16\"", "-1", "1.5", "true", "18446744073709551616"] {
            let data = format!("{{\"capabilities\":{{\"max_msg_fds\":{wrong}}}}}\0");
            assert!(parse(0, 0, data.as_bytes()).is_err(), "{data}");
        }
    }
}
