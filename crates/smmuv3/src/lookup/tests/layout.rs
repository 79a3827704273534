//! STE and CD fields against a list of their positions that was written down from the architecture, not from the types.

use portcullis_arch::smmuv3::{Cd, L1Cd, L1Std, Ste};

type Field<T> = (usize, u32, u32, &'static str, fn(&T) -> u64);

fn check<T>(fields: &[Field<T>], make: impl Fn([u64; 8]) -> T) {
    let mut covered = [0u64; 8];
    for &(word, hi, lo, name, get) in fields {
        let width = hi - lo + 1;
        let ones = u64::MAX >> (64 - width);
        let only = |value: u64| {
            let mut words = [0; 8];
            words[word] = value;
            make(words)
        };
        assert_eq!(get(&only(ones << lo)), ones, "{name} is at word {word} bits {hi}:{lo}");
        let mut others = [u64::MAX; 8];
        others[word] = !(ones << lo);
        assert_eq!(get(&make(others)), 0, "{name} takes nothing else");
        assert_eq!(covered[word] & ones << lo, 0, "{name} overlaps another field");
        covered[word] |= ones << lo;
    }
}

macro_rules! f {
    ($t:ty, $w:literal, $hi:literal, $lo:literal, $dw:ident, $name:ident) => {
        ($w, $hi, $lo, stringify!($name), |e: &$t| u64::from(e.$dw().$name()))
    };
}

#[test]
fn ste_fields_are_where_the_architecture_has_them() {
    macro_rules! s { ($($w:literal $hi:literal $lo:literal $dw:ident $name:ident,)*) => { &[$(f!(Ste, $w, $hi, $lo, $dw, $name),)*] } }
    let fields: &[Field<Ste>] = s! {
        0 0 0 dw0 v, 0 3 1 dw0 config, 0 5 4 dw0 s1fmt, 0 55 6 dw0 s1contextptr_55_6, 0 63 59 dw0 s1cdmax,
        1 1 0 dw1 s1dss, 1 3 2 dw1 s1cir, 1 5 4 dw1 s1cor, 1 7 6 dw1 s1csh, 1 11 8 dw1 s2hwu, 1 12 12 dw1 dre,
        1 16 13 dw1 cont, 1 17 17 dw1 dcp, 1 18 18 dw1 ppar, 1 19 19 dw1 mev, 1 23 20 dw1 software, 1 24 24 dw1 s1pie,
        1 25 25 dw1 s2fwb, 1 26 26 dw1 s1mpam, 1 27 27 dw1 s1stalld, 1 29 28 dw1 eats, 1 31 30 dw1 strw,
        1 35 32 dw1 memattr, 1 36 36 dw1 mtcfg, 1 40 37 dw1 alloccfg, 1 45 44 dw1 shcfg, 1 47 46 dw1 nscfg,
        1 49 48 dw1 privcfg, 1 51 50 dw1 instcfg, 1 63 52 dw1 impdef,
        2 15 0 dw2 s2vmid, 2 31 16 dw2 impdef, 2 37 32 dw2 s2t0sz, 2 39 38 dw2 s2sl0, 2 41 40 dw2 s2ir0, 2 43 42 dw2 s2or0,
        2 45 44 dw2 s2sh0, 2 47 46 dw2 s2tg, 2 50 48 dw2 s2ps, 2 51 51 dw2 s2aa64, 2 52 52 dw2 s2endi, 2 53 53 dw2 s2affd,
        2 54 54 dw2 s2ptw, 2 55 55 dw2 s2hd, 2 56 56 dw2 s2ha, 2 57 57 dw2 s2s, 2 58 58 dw2 s2r, 2 59 59 dw2 s2haft,
        2 60 60 dw2 s2pie, 2 61 61 dw2 s2poe, 2 63 62 dw2 dpt_vmatch,
        3 0 0 dw3 s2nsw, 3 1 1 dw3 s2nsa, 3 2 2 dw3 s2sl0_2, 3 3 3 dw3 s2ds, 3 51 4 dw3 s2ttb_51_4, 3 62 61 dw3 s2skl,
        4 15 0 dw4 impdef, 4 31 16 dw4 partid, 4 37 32 dw4 s_s2t0sz, 4 39 38 dw4 s_s2sl0, 4 47 46 dw4 s_s2tg, 4 63 48 dw4 mecid,
        5 7 0 dw5 pmg, 5 8 8 dw5 mpam_ns, 5 9 9 dw5 assured_only, 5 10 10 dw5 tl0, 5 11 11 dw5 tl1, 5 55 12 dw5 vmsptr_55_12,
        6 0 0 dw6 s2sw, 6 1 1 dw6 s2sa, 6 2 2 dw6 s_s2sl0_2, 6 51 4 dw6 s_s2ttb_51_4,
    };
    check(fields, Ste);
    check(
        &[
            (0, 55, 6, "S1ContextPtr", |e: &Ste| e.s1_context_ptr() >> 6),
            (3, 51, 4, "S2TTB", |e: &Ste| e.s2ttb() >> 4),
        ],
        Ste,
    );
}

#[test]
fn cd_fields_are_where_the_architecture_has_them() {
    macro_rules! c { ($($w:literal $hi:literal $lo:literal $dw:ident $name:ident,)*) => { &[$(f!(Cd, $w, $hi, $lo, $dw, $name),)*] } }
    let fields: &[Field<Cd>] = c! {
        0 5 0 dw0 t0sz, 0 7 6 dw0 tg0, 0 9 8 dw0 ir0, 0 11 10 dw0 or0, 0 13 12 dw0 sh0, 0 14 14 dw0 epd0, 0 15 15 dw0 endi,
        0 21 16 dw0 t1sz, 0 23 22 dw0 tg1, 0 25 24 dw0 ir1, 0 27 26 dw0 or1, 0 29 28 dw0 sh1, 0 30 30 dw0 epd1, 0 31 31 dw0 v,
        0 34 32 dw0 ips, 0 35 35 dw0 affd, 0 36 36 dw0 wxn, 0 37 37 dw0 uwxn, 0 38 38 dw0 tbi0, 0 39 39 dw0 tbi1, 0 40 40 dw0 pan,
        0 41 41 dw0 aa64, 0 42 42 dw0 hd, 0 43 43 dw0 ha, 0 44 44 dw0 s, 0 45 45 dw0 r, 0 46 46 dw0 a, 0 47 47 dw0 aset, 0 63 48 dw0 asid,
        1 0 0 dw1 nscfg0, 1 1 1 dw1 had0, 1 2 2 dw1 e0pd0, 1 3 3 dw1 haft, 1 51 4 dw1 ttb0_51_4, 1 58 58 dw1 pnch, 1 59 59 dw1 epan, 1 63 60 dw1 hwu0,
        2 0 0 dw2 nscfg1, 2 1 1 dw2 had1, 2 2 2 dw2 e0pd1, 2 3 3 dw2 aie, 2 51 4 dw2 ttb1_51_4, 2 58 58 dw2 ds, 2 59 59 dw2 pie, 2 63 60 dw2 hwu1,
        5 31 0 dw5 impdef, 5 47 32 dw5 partid, 5 55 48 dw5 pmg,
    };
    check(fields, Cd);
    check(
        &[
            (1, 51, 4, "TTB0", |e: &Cd| e.ttb0() >> 4),
            (2, 51, 4, "TTB1", |e: &Cd| e.ttb1() >> 4),
            (3, 63, 0, "MAIR", |e: &Cd| e.mair()),
        ],
        Cd,
    );
}

#[test]
fn level_1_descriptors_are_where_the_architecture_has_them() {
    let l1std: &[Field<L1Std>] =
        &[(0, 4, 0, "Span", |d| d.span().into()), (0, 55, 6, "L2Ptr", |d| d.l2ptr_55_6())];
    check(l1std, |w| L1Std::from_bits(w[0]));
    let l1cd: &[Field<L1Cd>] = &[(0, 0, 0, "V", |d| d.v().into()), (0, 55, 12, "L2Ptr", |d| d.l2ptr_55_12())];
    check(l1cd, |w| L1Cd::from_bits(w[0]));
}
