//! Permissions of a leaf: what each kind of access may do, as six bits.

use portcullis_arch::{Access, Attributes};

/// One of the six kinds of access that page tables tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AccessKind(u8);

impl AccessKind {
    /// The kind of an access with these attributes. A write is always data (IHI 0062D: INSTCFG never applies
    /// to writes).
    #[inline]
    pub const fn new(access: Access, attrs: Attributes) -> Self {
        let privileged = if attrs.privileged() { 0 } else { 3 };
        let kind = match access {
            Access::Write => 1,
            Access::Read if attrs.instruction() => 2,
            Access::Read => 0,
        };
        Self(1 << (privileged + kind))
    }
    /// The bit of [`Perms`] that must be set.
    #[inline]
    pub const fn bit(self) -> u8 {
        self.0
    }
    /// True for a write.
    pub const fn is_write(self) -> bool {
        self.0 & 0b010_010 != 0
    }
    /// True for a privileged access.
    pub const fn is_privileged(self) -> bool {
        self.0 & 0b000_111 != 0
    }
    /// True for an instruction fetch.
    pub const fn is_fetch(self) -> bool {
        self.0 & 0b100_100 != 0
    }
}

/// The set of allowed kinds: privileged read, write, fetch in bits 0 to 2, unprivileged in bits 3 to 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Perms(pub u8);

impl Perms {
    /// Everything.
    pub const ALL: Self = Self(0x3f);

    /// From separate statements for privileged and unprivileged accesses: (read, write, fetch).
    pub const fn new(privileged: (bool, bool, bool), unprivileged: (bool, bool, bool)) -> Self {
        Self(
            privileged.0 as u8
                | (privileged.1 as u8) << 1
                | (privileged.2 as u8) << 2
                | (unprivileged.0 as u8) << 3
                | (unprivileged.1 as u8) << 4
                | (unprivileged.2 as u8) << 5,
        )
    }
    /// True if `kind` is allowed.
    #[inline]
    pub const fn allows(self, kind: AccessKind) -> bool {
        self.0 & kind.0 != 0
    }
    /// The same, without fetches if `allowed` is false.
    #[inline]
    pub const fn fetch_if(self, allowed: bool) -> Self {
        if allowed { self } else { Self(self.0 & 0b011_011) }
    }
    /// The same, without writes if `allowed` is false.
    #[inline]
    pub const fn write_if(self, allowed: bool) -> Self {
        if allowed { self } else { Self(self.0 & 0b101_101) }
    }
    /// What privileged accesses may do.
    #[inline]
    pub const fn privileged_only(self) -> Self {
        Self(self.0 & 0b000_111)
    }
    /// What both allow.
    #[inline]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
    /// What a stage 2 leaf of VMSAv8-64 allows; privilege plays no role.
    pub const fn stage2(read: bool, write: bool, fetch: bool) -> Self {
        Self::new((read, write, fetch), (read, write, fetch))
    }
}

impl core::fmt::Display for Perms {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        for (i, (shift, who)) in [(0, "privileged"), (3, "unprivileged")].into_iter().enumerate() {
            let p = self.0 >> shift;
            let c = |bit: u8, c: char| if p >> bit & 1 != 0 { c } else { '-' };
            write!(f, "{}{who} {}{}{}", if i == 0 { "" } else { ", " }, c(0, 'r'), c(1, 'w'), c(2, 'x'))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_is_never_an_instruction() {
        let a = Attributes::DEVICE_DEFAULT.with_instruction(true);
        assert!(!AccessKind::new(Access::Write, a).is_fetch());
        assert!(AccessKind::new(Access::Read, a).is_fetch());
        assert!(AccessKind::new(Access::Write, a).is_write());
    }

    #[test]
    fn privileges_are_told_apart() {
        let p = Perms::new((true, true, false), (true, false, false));
        let a = Attributes::DEVICE_DEFAULT;
        assert!(!p.allows(AccessKind::new(Access::Write, a)));
        assert!(p.allows(AccessKind::new(Access::Write, a.with_privileged(true))));
        assert_eq!(p.to_string(), "privileged rw-, unprivileged r--");
    }
}
