//! Every field of the SMMUv3 structures at the bit position that IHI 0070 (and, where its pictures are lost, Linux's and
//! other drivers' headers) give it. The positions here were typed in from the manual's tables, not from the types.

use portcullis_arch::smmuv3::{cd, cmd, event, regs, ste};

/// Each line: the setter that sets exactly this field, its highest and its lowest bit.
macro_rules! layout {
    ($name:ident, $ty:ty, $raw:ty; $($set:ident $value:expr, $hi:literal, $lo:literal;)*) => {
        #[test]
        fn $name() {
            let mut covered: $raw = 0;
            $(
                let want: $raw = (<$raw>::MAX >> (<$raw>::BITS - 1 - ($hi - $lo))) << $lo;
                let got: $raw = <$ty>::from_bits(0).$set($value).into_bits();
                assert_eq!(got, want, "{}.{}", stringify!($ty), stringify!($set));
                assert_eq!(covered & want, 0, "{} overlaps", stringify!($set));
                covered |= want;
            )*
            // What is not a field here is not one there.
            assert_ne!(covered, 0);
        }
    };
}

const M8: u8 = u8::MAX;

layout!(idr0, regs::Idr0, u32;
    with_s2p true, 0, 0; with_s1p true, 1, 1; with_ttf 3, 3, 2; with_cohacc true, 4, 4; with_btm true, 5, 5;
    with_httu 3, 7, 6; with_dormhint true, 8, 8; with_hyp true, 9, 9; with_ats true, 10, 10; with_ns1ats true, 11, 11;
    with_asid16 true, 12, 12; with_msi true, 13, 13; with_sev true, 14, 14; with_atos true, 15, 15;
    with_pri true, 16, 16; with_vmw true, 17, 17; with_vmid16 true, 18, 18; with_cd2l true, 19, 19;
    with_vatos true, 20, 20; with_ttendian 3, 22, 21; with_atsrecerr true, 23, 23; with_stall_model 3, 25, 24;
    with_term_model true, 26, 26; with_st_level 3, 28, 27; with_rme_impl true, 30, 30;
);
layout!(idr1, regs::Idr1, u32;
    with_sidsize 63, 5, 0; with_ssidsize 31, 10, 6; with_priqs 31, 15, 11; with_eventqs 31, 20, 16;
    with_cmdqs 31, 25, 21; with_attr_perms_ovr true, 26, 26; with_attr_types_ovr true, 27, 27; with_rel true, 28, 28;
    with_queues_preset true, 29, 29; with_tables_preset true, 30, 30; with_ecmdq true, 31, 31;
);
layout!(idr3, regs::Idr3, u32;
    with_had true, 2, 2; with_pbha true, 3, 3; with_xnx true, 4, 4; with_pps true, 5, 5; with_mpam true, 7, 7;
    with_fwb true, 8, 8; with_stt true, 9, 9; with_ril true, 10, 10; with_bbml 3, 12, 11; with_e0pd true, 13, 13;
    with_ptwnnc true, 14, 14; with_dpt true, 15, 15; with_pasidtt true, 16, 16; with_epan true, 17, 17;
    with_s1pi true, 18, 18; with_s2pi true, 19, 19; with_s2po true, 20, 20; with_the true, 21, 21;
    with_mteperm true, 22, 22; with_aie true, 23, 23;
);
layout!(idr5, regs::Idr5, u32;
    with_oas 7, 2, 0; with_gran4k true, 4, 4; with_gran16k true, 5, 5; with_gran64k true, 6, 6; with_ds true, 7, 7;
    with_d128 true, 8, 8; with_vax 3, 11, 10; with_stall_max u16::MAX, 31, 16;
);
layout!(s_idr0, regs::SIdr0, u32; with_msi true, 13, 13; with_stall_model 3, 25, 24; with_ecmdq true, 31, 31;);
layout!(s_idr1, regs::SIdr1, u32; with_s_sidsize 63, 5, 0; with_sel2 true, 29, 29; with_secure_impl true, 31, 31;);
layout!(cr0, regs::Cr0, u32;
    with_smmuen true, 0, 0; with_priqen true, 1, 1; with_eventqen true, 2, 2; with_cmdqen true, 3, 3;
    with_atschk true, 4, 4; with_sif true, 5, 5; with_vmw 7, 8, 6; with_nsstalld true, 9, 9; with_dpt_walk_en true, 10, 10;
);
layout!(cr1, regs::Cr1, u32;
    with_queue_ic 3, 1, 0; with_queue_oc 3, 3, 2; with_queue_sh 3, 5, 4; with_table_ic 3, 7, 6; with_table_oc 3, 9, 8;
    with_table_sh 3, 11, 10;
);
layout!(cr2, regs::Cr2, u32;
    with_e2h true, 0, 0; with_recinvsid true, 1, 1; with_ptm true, 2, 2; with_rec_cfg_ats true, 3, 3;
);
layout!(gbpa, regs::Gbpa, u32;
    with_memattr 15, 3, 0; with_mtcfg true, 4, 4; with_alloccfg 15, 11, 8; with_shcfg 3, 13, 12; with_nscfg 3, 15, 14;
    with_privcfg 3, 17, 16; with_instcfg 3, 19, 18; with_abort true, 20, 20; with_update true, 31, 31;
);
layout!(irq_ctrl, regs::IrqCtrl, u32;
    with_gerror_irqen true, 0, 0; with_priq_irqen true, 1, 1; with_eventq_irqen true, 2, 2;
);
layout!(gerror, regs::Gerror, u32;
    with_cmdq_err true, 0, 0; with_eventq_abt_err true, 2, 2; with_priq_abt_err true, 3, 3;
    with_msi_cmdq_abt_err true, 4, 4; with_msi_eventq_abt_err true, 5, 5; with_msi_priq_abt_err true, 6, 6;
    with_msi_gerror_abt_err true, 7, 7; with_sfm_err true, 8, 8; with_cmdqp_err true, 9, 9; with_dpt_err true, 10, 10;
);
layout!(irq_cfg2, regs::IrqCfg2, u32; with_memattr 15, 3, 0; with_sh 3, 5, 4; with_lo true, 31, 31;);
layout!(strtab_base, regs::StrtabBase, u64; with_addr_55_6 (1 << 50) - 1, 55, 6; with_ra true, 62, 62;);
layout!(strtab_base_cfg, regs::StrtabBaseCfg, u32; with_log2size 63, 5, 0; with_split 31, 10, 6; with_fmt 3, 17, 16;);
layout!(queue_base, regs::QueueBase, u64;
    with_log2size 31, 4, 0; with_addr_55_5 (1 << 51) - 1, 55, 5; with_allocate true, 62, 62;
);
layout!(gatos_sid, regs::GatosSid, u64;
    with_streamid u32::MAX, 31, 0; with_substreamid 0xf_ffff, 51, 32; with_ssid_valid true, 52, 52; with_ssec true, 53, 53;
);
layout!(gatos_addr, regs::GatosAddr, u64;
    with_httui true, 6, 6; with_ind true, 7, 7; with_rnw true, 8, 8; with_pnu true, 9, 9; with_kind 3, 11, 10;
    with_addr_63_12 (1 << 52) - 1, 63, 12;
);

layout!(l1std, ste::L1Std, u64; with_span 31, 4, 0; with_l2ptr_55_6 (1 << 50) - 1, 55, 6;);
layout!(ste0, ste::SteDw0, u64;
    with_v true, 0, 0; with_config 7, 3, 1; with_s1fmt 3, 5, 4; with_s1contextptr_55_6 (1 << 50) - 1, 55, 6;
    with_s1cdmax 31, 63, 59;
);
layout!(ste1, ste::SteDw1, u64;
    with_s1dss 3, 1, 0; with_s1cir 3, 3, 2; with_s1cor 3, 5, 4; with_s1csh 3, 7, 6; with_s2hwu 15, 11, 8;
    with_dre true, 12, 12; with_cont 15, 16, 13; with_dcp true, 17, 17; with_ppar true, 18, 18; with_mev true, 19, 19;
    with_software 15, 23, 20; with_s1pie true, 24, 24; with_s2fwb true, 25, 25; with_s1mpam true, 26, 26;
    with_s1stalld true, 27, 27; with_eats 3, 29, 28; with_strw 3, 31, 30; with_memattr 15, 35, 32;
    with_mtcfg true, 36, 36; with_alloccfg 15, 40, 37; with_shcfg 3, 45, 44; with_nscfg 3, 47, 46; with_privcfg 3, 49, 48;
    with_instcfg 3, 51, 50; with_impdef 0xfff, 63, 52;
);
layout!(ste2, ste::SteDw2, u64;
    with_s2vmid u16::MAX, 15, 0; with_impdef u16::MAX, 31, 16; with_s2t0sz 63, 37, 32; with_s2sl0 3, 39, 38;
    with_s2ir0 3, 41, 40; with_s2or0 3, 43, 42; with_s2sh0 3, 45, 44; with_s2tg 3, 47, 46; with_s2ps 7, 50, 48;
    with_s2aa64 true, 51, 51; with_s2endi true, 52, 52; with_s2affd true, 53, 53; with_s2ptw true, 54, 54;
    with_s2hd true, 55, 55; with_s2ha true, 56, 56; with_s2s true, 57, 57; with_s2r true, 58, 58;
    with_s2haft true, 59, 59; with_s2pie true, 60, 60; with_s2poe true, 61, 61; with_dpt_vmatch 3, 63, 62;
);
layout!(ste3, ste::SteDw3, u64;
    with_s2nsw true, 0, 0; with_s2nsa true, 1, 1; with_s2sl0_2 true, 2, 2; with_s2ds true, 3, 3;
    with_s2ttb_51_4 (1 << 48) - 1, 51, 4; with_s2skl 3, 62, 61;
);
layout!(ste4, ste::SteDw4, u64;
    with_impdef u16::MAX, 15, 0; with_partid u16::MAX, 31, 16; with_s_s2t0sz 63, 37, 32; with_s_s2sl0 3, 39, 38;
    with_s_s2tg 3, 47, 46; with_mecid u16::MAX, 63, 48;
);
layout!(ste5, ste::SteDw5, u64;
    with_pmg M8, 7, 0; with_mpam_ns true, 8, 8; with_assured_only true, 9, 9; with_tl0 true, 10, 10; with_tl1 true, 11, 11;
    with_vmsptr_55_12 (1 << 44) - 1, 55, 12;
);
layout!(ste6, ste::SteDw6, u64;
    with_s2sw true, 0, 0; with_s2sa true, 1, 1; with_s_s2sl0_2 true, 2, 2; with_s_s2ttb_51_4 (1 << 48) - 1, 51, 4;
);
layout!(l1cd, cd::L1Cd, u64; with_v true, 0, 0; with_l2ptr_55_12 (1 << 44) - 1, 55, 12;);
layout!(cd0, cd::CdDw0, u64;
    with_t0sz 63, 5, 0; with_tg0 3, 7, 6; with_ir0 3, 9, 8; with_or0 3, 11, 10; with_sh0 3, 13, 12; with_epd0 true, 14, 14;
    with_endi true, 15, 15; with_t1sz 63, 21, 16; with_tg1 3, 23, 22; with_ir1 3, 25, 24; with_or1 3, 27, 26;
    with_sh1 3, 29, 28; with_epd1 true, 30, 30; with_v true, 31, 31; with_ips 7, 34, 32; with_affd true, 35, 35;
    with_wxn true, 36, 36; with_uwxn true, 37, 37; with_tbi0 true, 38, 38; with_tbi1 true, 39, 39; with_pan true, 40, 40;
    with_aa64 true, 41, 41; with_hd true, 42, 42; with_ha true, 43, 43; with_s true, 44, 44; with_r true, 45, 45;
    with_a true, 46, 46; with_aset true, 47, 47; with_asid u16::MAX, 63, 48;
);
layout!(cd1, cd::CdDw1, u64;
    with_nscfg0 true, 0, 0; with_had0 true, 1, 1; with_e0pd0 true, 2, 2; with_haft true, 3, 3;
    with_ttb0_51_4 (1 << 48) - 1, 51, 4; with_pnch true, 58, 58; with_epan true, 59, 59; with_hwu0 15, 63, 60;
);
layout!(cd2, cd::CdDw2, u64;
    with_nscfg1 true, 0, 0; with_had1 true, 1, 1; with_e0pd1 true, 2, 2; with_aie true, 3, 3;
    with_ttb1_51_4 (1 << 48) - 1, 51, 4; with_ds true, 58, 58; with_pie true, 59, 59; with_hwu1 15, 63, 60;
);
layout!(cd5, cd::CdDw5, u64; with_impdef u32::MAX, 31, 0; with_partid u16::MAX, 47, 32; with_pmg M8, 55, 48;);

layout!(prefetch, cmd::Prefetch, u128;
    with_opcode M8, 7, 0; with_ssec true, 10, 10; with_ssv true, 11, 11; with_ssid 0xf_ffff, 31, 12;
    with_sid u32::MAX, 63, 32; with_size 31, 68, 64; with_stride 31, 73, 69; with_ns true, 75, 75;
    with_addr_63_12 (1 << 52) - 1, 127, 76;
);
layout!(cfgi, cmd::Cfgi, u128;
    with_opcode M8, 7, 0; with_ssec true, 10, 10; with_ssid 0xf_ffff, 31, 12; with_sid u32::MAX, 63, 32;
    with_range 31, 68, 64;
);
layout!(tlbi, cmd::Tlbi, u128;
    with_opcode M8, 7, 0; with_ssec true, 10, 10; with_num 31, 16, 12; with_scale 63, 25, 20; with_vmid u16::MAX, 47, 32;
    with_asid u16::MAX, 63, 48; with_leaf true, 64, 64; with_ttl128 true, 71, 71; with_ttl 3, 73, 72; with_tg 3, 75, 74;
    with_addr_63_12 (1 << 52) - 1, 127, 76;
);
layout!(atc_inv, cmd::AtcInv, u128;
    with_opcode M8, 7, 0; with_g true, 9, 9; with_ssec true, 10, 10; with_ssv true, 11, 11; with_ssid 0xf_ffff, 31, 12;
    with_sid u32::MAX, 63, 32; with_size 63, 69, 64; with_addr_63_12 (1 << 52) - 1, 127, 76;
);
layout!(pri_resp, cmd::PriResp, u128;
    with_opcode M8, 7, 0; with_ssec true, 10, 10; with_ssv true, 11, 11; with_ssid 0xf_ffff, 31, 12;
    with_sid u32::MAX, 63, 32; with_prg_index 0x1ff, 72, 64; with_resp 3, 77, 76;
);
layout!(resume, cmd::Resume, u128;
    with_opcode M8, 7, 0; with_ssec true, 10, 10; with_ac true, 12, 12; with_ab true, 13, 13; with_sid u32::MAX, 63, 32;
    with_stag u16::MAX, 79, 64;
);
layout!(sync, cmd::Sync, u128;
    with_opcode M8, 7, 0; with_ssec true, 10, 10; with_cs 3, 13, 12; with_msh 3, 23, 22; with_msiattr 15, 27, 24;
    with_msidata u32::MAX, 63, 32; with_msiaddr_55_2 (1 << 54) - 1, 119, 66; with_msi_ns true, 127, 127;
);

layout!(event0, event::EventDw0, u64;
    with_code M8, 7, 0; with_ssv true, 11, 11; with_ssid 0xf_ffff, 31, 12; with_sid u32::MAX, 63, 32;
);
layout!(event1, event::EventDw1, u64;
    with_stag u16::MAX, 15, 0; with_gpcf true, 16, 16; with_stall true, 31, 31; with_pnu true, 33, 33; with_ind true, 34, 34;
    with_rnw true, 35, 35; with_nsipa true, 38, 38; with_s2 true, 39, 39; with_class 3, 41, 40; with_dirty_bit true, 42, 42;
    with_assured_only true, 43, 43; with_ttrnw true, 44, 44; with_overlay true, 45, 45; with_impdef u16::MAX, 63, 48;
);
layout!(bad_ats_treq, event::BadAtsTreqDw1, u64;
    with_span 31, 4, 0; with_privileged true, 28, 28; with_x true, 29, 29; with_w true, 30, 30; with_r true, 31, 31;
);
layout!(page_request, event::PageRequestDw1, u64;
    with_ux true, 33, 33; with_uw true, 34, 34; with_ur true, 35, 35; with_px true, 37, 37; with_pw true, 38, 38;
    with_pr true, 39, 39; with_span M8, 51, 44;
);
layout!(pri0, event::PriDw0, u64;
    with_sid u32::MAX, 31, 0; with_ssid 0xf_ffff, 51, 32; with_privileged true, 58, 58; with_x true, 59, 59;
    with_r true, 60, 60; with_w true, 61, 61; with_last true, 62, 62; with_ssv true, 63, 63;
);
layout!(pri1, event::PriDw1, u64; with_prg_index 0x1ff, 8, 0; with_addr_63_12 (1 << 52) - 1, 63, 12;);

#[test]
fn opcodes_and_event_codes_are_the_architectures() {
    use cmd::Opcode as O;
    let want = [
        (0x01, O::PrefetchConfig),
        (0x02, O::PrefetchAddr),
        (0x03, O::CfgiSte),
        (0x04, O::CfgiSteRange),
        (0x05, O::CfgiCd),
        (0x06, O::CfgiCdAll),
        (0x07, O::CfgiVmsPidm),
        (0x10, O::TlbiNhAll),
        (0x11, O::TlbiNhAsid),
        (0x12, O::TlbiNhVa),
        (0x13, O::TlbiNhVaa),
        (0x18, O::TlbiEl3All),
        (0x1a, O::TlbiEl3Va),
        (0x20, O::TlbiEl2All),
        (0x21, O::TlbiEl2Asid),
        (0x22, O::TlbiEl2Va),
        (0x23, O::TlbiEl2Vaa),
        (0x28, O::TlbiS12Vmall),
        (0x2a, O::TlbiS2Ipa),
        (0x30, O::TlbiNsnhAll),
        (0x40, O::AtcInv),
        (0x41, O::PriResp),
        (0x44, O::Resume),
        (0x45, O::StallTerm),
        (0x46, O::Sync),
        (0x50, O::TlbiSEl2All),
        (0x51, O::TlbiSEl2Asid),
        (0x52, O::TlbiSEl2Va),
        (0x53, O::TlbiSEl2Vaa),
        (0x58, O::TlbiSS12Vmall),
        (0x5a, O::TlbiSS2Ipa),
        (0x60, O::TlbiSnhAll),
        (0x70, O::DptiAll),
        (0x73, O::DptiPa),
    ];
    assert_eq!(O::ALL.len(), want.len());
    for code in 0..=255u8 {
        assert_eq!(O::from_code(code), want.iter().find(|w| w.0 == code).map(|w| w.1), "{code:#x}");
    }
    use event::EventCode as E;
    let want = [
        (0x01, "F_UUT"),
        (0x02, "C_BAD_STREAMID"),
        (0x03, "F_STE_FETCH"),
        (0x04, "C_BAD_STE"),
        (0x05, "F_BAD_ATS_TREQ"),
        (0x06, "F_STREAM_DISABLED"),
        (0x07, "F_TRANSL_FORBIDDEN"),
        (0x08, "C_BAD_SUBSTREAMID"),
        (0x09, "F_CD_FETCH"),
        (0x0a, "C_BAD_CD"),
        (0x0b, "F_WALK_EABT"),
        (0x10, "F_TRANSLATION"),
        (0x11, "F_ADDR_SIZE"),
        (0x12, "F_ACCESS"),
        (0x13, "F_PERMISSION"),
        (0x20, "F_TLB_CONFLICT"),
        (0x21, "F_CFG_CONFLICT"),
        (0x24, "E_PAGE_REQUEST"),
        (0x25, "F_VMS_FETCH"),
    ];
    assert_eq!(E::ALL.len(), want.len());
    for code in 0..=255u8 {
        let named = want.iter().find(|w| w.0 == code).map(|w| w.1);
        assert_eq!(E::from_code(code).map(E::name), named, "{code:#x}");
    }
}

#[test]
fn registers_are_where_the_manual_puts_them() {
    use regs::offset as o;
    let want = [
        (o::IDR0, 0x0),
        (o::IDR1, 0x4),
        (o::IDR2, 0x8),
        (o::IDR3, 0xc),
        (o::IDR4, 0x10),
        (o::IDR5, 0x14),
        (o::IIDR, 0x18),
        (o::AIDR, 0x1c),
        (o::CR0, 0x20),
        (o::CR0ACK, 0x24),
        (o::CR1, 0x28),
        (o::CR2, 0x2c),
        (o::S_INIT, 0x3c),
        (o::STATUSR, 0x40),
        (o::GBPA, 0x44),
        (o::AGBPA, 0x48),
        (o::IRQ_CTRL, 0x50),
        (o::IRQ_CTRLACK, 0x54),
        (o::GERROR, 0x60),
        (o::GERRORN, 0x64),
        (o::GERROR_IRQ_CFG0, 0x68),
        (o::GERROR_IRQ_CFG1, 0x70),
        (o::GERROR_IRQ_CFG2, 0x74),
        (o::STRTAB_BASE, 0x80),
        (o::STRTAB_BASE_CFG, 0x88),
        (o::CMDQ_BASE, 0x90),
        (o::CMDQ_PROD, 0x98),
        (o::CMDQ_CONS, 0x9c),
        (o::EVENTQ_BASE, 0xa0),
        (o::EVENTQ_PROD, 0xa8),
        (o::EVENTQ_CONS, 0xac),
        (o::EVENTQ_IRQ_CFG0, 0xb0),
        (o::EVENTQ_IRQ_CFG1, 0xb8),
        (o::EVENTQ_IRQ_CFG2, 0xbc),
        (o::PRIQ_BASE, 0xc0),
        (o::PRIQ_PROD, 0xc8),
        (o::PRIQ_CONS, 0xcc),
        (o::PRIQ_IRQ_CFG0, 0xd0),
        (o::PRIQ_IRQ_CFG1, 0xd8),
        (o::PRIQ_IRQ_CFG2, 0xdc),
        (o::GATOS_CTRL, 0x100),
        (o::GATOS_SID, 0x108),
        (o::GATOS_ADDR, 0x110),
        (o::GATOS_PAR, 0x118),
        (o::PIDR4, 0xfd0),
        (o::CIDR3, 0xffc),
    ];
    for (got, want) in want {
        assert_eq!(got, want);
    }
    assert_eq!((regs::PAGE, regs::SECURE), (0x1_0000, 0x8000));
}
