//! One request of the peer: checked by the rules of the protocol, put to the function, answered.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::capabilities::{self, PeerVersion};
use super::connection::Limits;
use super::counters::Counters;
use super::error::{ConnectionError, Problem, Refusal};
use super::function::{DmaMap, DmaUnmap, Function, IrqAction, IrqData, SetIrqs};
use super::input::Attached;
use super::mappings::{Covered, Mappings};
use super::output::Output;
use super::wire::{self, Command, Header, set_irqs_flags};

/// The state of the protocol, apart from bytes under way.
pub(super) struct Server {
    pub(super) limits: Limits,
    pub(super) peer: Option<PeerVersion>,
    pub(super) counters: Counters,
    pub(super) problem: Option<Problem>,
    mappings: Mappings,
}

/// One request.
struct Call<'a> {
    header: &'a Header,
    body: &'a [u8],
    attached: Attached,
}

/// Why a request gets an error reply.
struct Refused {
    errno: Errno,
    what: &'static str,
}

const fn refused(errno: Errno, what: &'static str) -> Refused {
    Refused { errno, what }
}

const fn invalid(what: &'static str) -> Refused {
    refused(Errno::INVAL, what)
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        refused(refusal.0, "the device refuses")
    }
}

impl Call<'_> {
    /// The fixed part of the payload and what follows it.
    fn fixed<T: FromBytes + KnownLayout + Immutable>(&self) -> Result<(T, &[u8]), Refused> {
        T::read_from_prefix(self.body).map_err(|_| invalid("the payload is shorter than its structure"))
    }

    /// Takes the descriptors, which must have come whole.
    fn take_fds(&mut self) -> Result<Vec<OwnedFd>, Refused> {
        if self.attached.lost {
            return Err(refused(Errno::MFILE, "more file descriptors than can be taken"));
        }
        Ok(std::mem::take(&mut self.attached.fds))
    }
}

impl Server {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            peer: None,
            counters: Counters::default(),
            problem: None,
            mappings: Mappings::default(),
        }
    }

    /// Serves one request. An error ends the connection; its error reply is queued.
    pub(super) fn serve(
        &mut self,
        offset: u64,
        header: &Header,
        body: &[u8],
        attached: Attached,
        output: &mut Output,
        function: &mut dyn Function,
    ) -> Result<(), ConnectionError> {
        let number = header.command.get();
        self.counters.count_request(number);
        if header.no_reply() {
            self.counters.posted += 1;
        }
        let mut call = Call { header, body, attached };
        let outcome = match (Command::from_number(number), &self.peer) {
            (Some(Command::Version), _) => self.version(&call, output),
            (_, None) => Err(invalid("a request before VERSION")),
            (Some(command), Some(_)) => self.dispatch(command, &mut call, output, function),
            (None, Some(_)) => Err(refused(Errno::NOSYS, "unknown command")),
        };
        self.counters.fds_closed += call.attached.fds.len() as u64;
        let Err(Refused { errno, what }) = outcome else { return Ok(()) };
        self.counters.refused += 1;
        self.problem =
            Some(Problem { offset, id: header.id.get(), command: number, errno: Some(errno), what });
        if !header.no_reply() {
            self.counters.replies_sent += 1;
            output.push(&header.error_reply(errno.raw_os_error().unsigned_abs()), &[], &[]);
        }
        if errno == Errno::PROTONOSUPPORT
            && let Ok((proposed, _)) = wire::Version::read_from_prefix(body)
        {
            let (major, minor) = (proposed.major.get(), proposed.minor.get());
            return Err(ConnectionError::Version { major, minor });
        }
        Ok(())
    }

    fn dispatch(
        &mut self,
        command: Command,
        call: &mut Call<'_>,
        output: &mut Output,
        function: &mut dyn Function,
    ) -> Result<(), Refused> {
        match command {
            Command::RegionWrite => self.region_write(call, output, function),
            Command::RegionRead => self.region_read(call, output, function),
            Command::RegionWriteMulti => self.region_write_multi(call, output, function),
            Command::DmaMap => self.dma_map(call, output, function),
            Command::DmaUnmap => self.dma_unmap(call, output, function),
            Command::DeviceGetInfo => self.device_info(call, output, function),
            Command::DeviceGetRegionInfo => self.region_info(call, output, function),
            Command::DeviceGetIrqInfo => self.irq_info(call, output, function),
            Command::DeviceSetIrqs => self.set_irqs(call, output, function),
            Command::DeviceReset => self.reset(call, output, function),
            Command::DmaRead | Command::DmaWrite => {
                Err(refused(Errno::NOTSUP, "a command that only a server sends"))
            }
            Command::Version
            | Command::DeviceGetRegionIoFds
            | Command::DirtyPages
            | Command::DeviceFeature
            | Command::MigDataRead
            | Command::MigDataWrite => Err(refused(Errno::NOTSUP, "a command that is not offered")),
        }
    }

    fn reply(&mut self, call: &Call<'_>, output: &mut Output, first: &[u8], second: &[u8]) {
        if !call.header.no_reply() {
            self.counters.replies_sent += 1;
            output.push(&call.header.reply(first.len() + second.len()), first, second);
        }
    }

    fn version(&mut self, call: &Call<'_>, output: &mut Output) -> Result<(), Refused> {
        if self.peer.is_some() {
            return Err(invalid("a second VERSION"));
        }
        let (proposed, data) = call.fixed::<wire::Version>()?;
        let (major, minor) = (proposed.major.get(), proposed.minor.get());
        if major != 0 {
            return Err(refused(Errno::PROTONOSUPPORT, "a major version that is not 0"));
        }
        let (peer, offered) = capabilities::parse(major, minor, data).map_err(invalid)?;
        // 0.0: QEMU refuses a reply with a higher minor version than it proposed, and it proposes 0.
        let version = wire::Version::default();
        let text = capabilities::answer(offered, &self.limits);
        self.reply(call, output, version.as_bytes(), &text);
        self.peer = Some(peer);
        Ok(())
    }

    fn device_info(
        &mut self,
        call: &Call<'_>,
        output: &mut Output,
        function: &dyn Function,
    ) -> Result<(), Refused> {
        let (asked, _) = call.fixed::<wire::DeviceInfo>()?;
        check_argsz::<wire::DeviceInfo>(asked.argsz.get())?;
        let info = function.device_info();
        let answer = wire::DeviceInfo {
            argsz: argsz::<wire::DeviceInfo>().into(),
            flags: bits(&[(info.reset, wire::device_flags::RESET), (info.pci, wire::device_flags::PCI)])
                .into(),
            num_regions: info.regions.into(),
            num_irqs: info.irqs.into(),
        };
        self.reply(call, output, answer.as_bytes(), &[]);
        Ok(())
    }

    fn region_info(
        &mut self,
        call: &Call<'_>,
        output: &mut Output,
        function: &dyn Function,
    ) -> Result<(), Refused> {
        let (asked, _) = call.fixed::<wire::RegionInfo>()?;
        check_argsz::<wire::RegionInfo>(asked.argsz.get())?;
        if asked.index.get() >= function.device_info().regions {
            return Err(invalid("a region index the device does not have"));
        }
        let info = function.region(asked.index.get());
        let answer = wire::RegionInfo {
            argsz: argsz::<wire::RegionInfo>().into(),
            flags: bits(&[(info.read, wire::region_flags::READ), (info.write, wire::region_flags::WRITE)])
                .into(),
            index: asked.index,
            size: info.size.into(),
            ..wire::RegionInfo::default()
        };
        self.reply(call, output, answer.as_bytes(), &[]);
        Ok(())
    }

    fn irq_info(
        &mut self,
        call: &Call<'_>,
        output: &mut Output,
        function: &dyn Function,
    ) -> Result<(), Refused> {
        let (asked, _) = call.fixed::<wire::IrqInfo>()?;
        check_argsz::<wire::IrqInfo>(asked.argsz.get())?;
        if asked.index.get() >= function.device_info().irqs {
            return Err(invalid("an interrupt index the device does not have"));
        }
        let info = function.irq(asked.index.get());
        let flags = bits(&[
            (info.eventfd, wire::irq_flags::EVENTFD),
            (info.maskable, wire::irq_flags::MASKABLE),
            (info.automasked, wire::irq_flags::AUTOMASKED),
            (info.noresize, wire::irq_flags::NORESIZE),
        ]);
        let answer = wire::IrqInfo {
            argsz: argsz::<wire::IrqInfo>().into(),
            flags: flags.into(),
            index: asked.index,
            count: info.count.into(),
        };
        self.reply(call, output, answer.as_bytes(), &[]);
        Ok(())
    }

    fn set_irqs(
        &mut self,
        call: &mut Call<'_>,
        output: &mut Output,
        function: &mut dyn Function,
    ) -> Result<(), Refused> {
        let (asked, data) = call.fixed::<wire::SetIrqs>()?;
        check_argsz::<wire::SetIrqs>(asked.argsz.get())?;
        let (index, start, count) = (asked.index.get(), asked.start.get(), asked.count.get());
        if index >= function.device_info().irqs {
            return Err(invalid("an interrupt index the device does not have"));
        }
        if start.checked_add(count).is_none_or(|end| end > function.irq(index).count) {
            return Err(invalid("interrupts outside their index"));
        }
        const DATA: u32 =
            set_irqs_flags::DATA_NONE | set_irqs_flags::DATA_BOOL | set_irqs_flags::DATA_EVENTFD;
        let flags = asked.flags.get();
        let action = match flags & !DATA {
            set_irqs_flags::ACTION_MASK => IrqAction::Mask,
            set_irqs_flags::ACTION_UNMASK => IrqAction::Unmask,
            set_irqs_flags::ACTION_TRIGGER => IrqAction::Trigger,
            _ => return Err(invalid("not exactly one interrupt action")),
        };
        let data_kind = flags & DATA;
        if count == 0 && (data_kind != set_irqs_flags::DATA_NONE || action != IrqAction::Trigger) {
            return Err(invalid("no interrupts, and not the request that disables all"));
        }
        let data = match data_kind {
            set_irqs_flags::DATA_NONE => IrqData::None,
            set_irqs_flags::DATA_BOOL => {
                let flags = data.get(..count as usize).ok_or(invalid("fewer flags than interrupts"))?;
                IrqData::Bool(flags.iter().map(|&flag| flag != 0).collect())
            }
            set_irqs_flags::DATA_EVENTFD => {
                let mut fds = call.take_fds()?;
                if !fds.is_empty() && fds.len() < count as usize {
                    return Err(invalid("fewer eventfds than interrupts"));
                }
                // More than asked for: the rest stays behind and is closed.
                call.attached.fds = fds.split_off(fds.len().min(count as usize));
                IrqData::Eventfds(fds)
            }
            _ => return Err(invalid("not exactly one kind of interrupt data")),
        };
        function.set_irqs(SetIrqs { index, start, count, action, data })?;
        self.reply(call, output, &[], &[]);
        Ok(())
    }

    fn dma_map(
        &mut self,
        call: &mut Call<'_>,
        output: &mut Output,
        function: &mut dyn Function,
    ) -> Result<(), Refused> {
        let (asked, _) = call.fixed::<wire::DmaMap>()?;
        check_argsz::<wire::DmaMap>(asked.argsz.get())?;
        let (iova, size, offset) = (asked.address.get(), asked.size.get(), asked.offset.get());
        let flags = asked.flags.get();
        if flags & !wire::map_flags::ALL != 0 {
            return Err(invalid("unknown map flags"));
        }
        let last = last_address(iova, size).ok_or(invalid("an empty map, or one past the address space"))?;
        if offset.checked_add(size).is_none() {
            return Err(invalid("a map past the end of any file"));
        }
        if self.mappings.overlaps(iova, last) {
            return Err(refused(Errno::EXIST, "a map over another one"));
        }
        if self.mappings.len() >= self.limits.max_dma_maps {
            return Err(refused(Errno::NOSPC, "more maps than were announced"));
        }
        let mut fds = call.take_fds()?;
        call.attached.fds = fds.split_off(fds.len().min(1));
        let mappable = flags & wire::map_flags::FILE_IO == 0 || flags & wire::map_flags::MMAP != 0;
        let map = DmaMap {
            iova,
            size,
            offset,
            readable: flags & wire::map_flags::READ != 0,
            writable: flags & wire::map_flags::WRITE != 0,
            fd: fds.pop().filter(|_| mappable),
        };
        function.dma_map(map)?;
        self.mappings.insert(iova, last);
        self.reply(call, output, &[], &[]);
        Ok(())
    }

    fn dma_unmap(
        &mut self,
        call: &Call<'_>,
        output: &mut Output,
        function: &mut dyn Function,
    ) -> Result<(), Refused> {
        let (asked, _) = call.fixed::<wire::DmaUnmap>()?;
        check_argsz::<wire::DmaUnmap>(asked.argsz.get())?;
        let flags = asked.flags.get();
        if flags & wire::unmap_flags::GET_DIRTY_BITMAP != 0 {
            return Err(refused(Errno::NOTSUP, "dirty pages are not tracked"));
        }
        if flags & !wire::unmap_flags::ALL != 0 {
            return Err(invalid("unknown unmap flags"));
        }
        if flags & wire::unmap_flags::ALL != 0 {
            function.dma_unmap(DmaUnmap::All)?;
            self.mappings.clear();
        } else {
            let (iova, size) = (asked.address.get(), asked.size.get());
            let last =
                last_address(iova, size).ok_or(invalid("an empty unmap, or one past the address space"))?;
            match self.mappings.covered(iova, last) {
                Covered::Nothing => return Err(refused(Errno::NOENT, "an unmap of nothing")),
                Covered::Part => return Err(invalid("an unmap of a part of a map")),
                Covered::Whole(ranges) => {
                    for (iova, size) in ranges {
                        function.dma_unmap(DmaUnmap::Range { iova, size })?;
                        self.mappings.remove(iova);
                    }
                }
            }
        }
        let answer = wire::DmaUnmap { argsz: argsz::<wire::DmaUnmap>().into(), ..asked };
        self.reply(call, output, answer.as_bytes(), &[]);
        Ok(())
    }

    fn region_read(
        &mut self,
        call: &Call<'_>,
        output: &mut Output,
        function: &mut dyn Function,
    ) -> Result<(), Refused> {
        let (asked, _) = call.fixed::<wire::RegionAccess>()?;
        self.check_access(&asked, function, false)?;
        let (region, offset) = (asked.region.get(), asked.offset.get());
        let count = asked.count.get() as usize;
        if call.header.no_reply() {
            // Nobody wants the data, but reading may have an effect.
            if count > 0 {
                function.read(region, offset, &mut vec![0; count]);
            }
            return Ok(());
        }
        self.counters.replies_sent += 1;
        let fixed = asked.as_bytes();
        let body = output.reserve(&call.header.reply(fixed.len() + count), fixed.len() + count);
        if let Some((head, data)) = body.split_at_mut_checked(fixed.len()) {
            head.copy_from_slice(fixed);
            if !data.is_empty() {
                function.read(region, offset, data);
            }
        }
        Ok(())
    }

    fn region_write(
        &mut self,
        call: &Call<'_>,
        output: &mut Output,
        function: &mut dyn Function,
    ) -> Result<(), Refused> {
        let (asked, data) = call.fixed::<wire::RegionAccess>()?;
        if data.len() != asked.count.get() as usize {
            return Err(invalid("a write whose data do not have the size of its count"));
        }
        self.check_access(&asked, function, true)?;
        if !data.is_empty() {
            function.write(asked.region.get(), asked.offset.get(), data);
        }
        self.reply(call, output, asked.as_bytes(), &[]);
        Ok(())
    }

    /// Each write stands for itself, as if it had come in a message of its own: one outside its region does not stop the
    /// others. The reply says how many were done.
    fn region_write_multi(
        &mut self,
        call: &Call<'_>,
        output: &mut Output,
        function: &mut dyn Function,
    ) -> Result<(), Refused> {
        let (announced, data) = call.fixed::<wire::WriteCount>()?;
        let writes = <[wire::WriteOne]>::ref_from_bytes(data)
            .map_err(|_| invalid("batched writes that are not a whole number of writes"))?;
        if writes.len() as u64 != announced.count.get() {
            return Err(invalid("a number of batched writes that is not what follows"));
        }
        let mut done = 0u64;
        let mut first_refused = None;
        for write in writes {
            let access =
                wire::RegionAccess { offset: write.offset, region: write.region, count: write.count };
            let data = write.data.get(..write.count.get() as usize);
            let outcome = data
                .ok_or(invalid("a batched write of more than 8 bytes"))
                .and_then(|data| self.check_access(&access, function, true).map(|()| data));
            match outcome {
                Ok(data) => {
                    if !data.is_empty() {
                        function.write(write.region.get(), write.offset.get(), data);
                    }
                    done += 1;
                    self.counters.batched_writes += 1;
                }
                Err(refused) => first_refused = first_refused.or(Some(refused)),
            }
        }
        match first_refused {
            Some(refused) if done == 0 || call.header.no_reply() => Err(refused),
            some_refused => {
                self.counters.refused += u64::from(some_refused.is_some());
                let answer = wire::WriteCount { count: done.into() };
                self.reply(call, output, answer.as_bytes(), &[]);
                Ok(())
            }
        }
    }

    fn reset(
        &mut self,
        call: &Call<'_>,
        output: &mut Output,
        function: &mut dyn Function,
    ) -> Result<(), Refused> {
        if !function.device_info().reset {
            return Err(refused(Errno::NOTSUP, "the device has no reset"));
        }
        function.reset();
        self.reply(call, output, &[], &[]);
        Ok(())
    }

    fn check_access(
        &self,
        access: &wire::RegionAccess,
        function: &dyn Function,
        write: bool,
    ) -> Result<(), Refused> {
        let (region, offset, count) = (access.region.get(), access.offset.get(), access.count.get());
        if count as usize > self.limits.max_data_xfer_size {
            return Err(invalid("an access larger than max_data_xfer_size"));
        }
        if region >= function.device_info().regions {
            return Err(invalid("a region index the device does not have"));
        }
        let info = function.region(region);
        if offset.checked_add(count.into()).is_none_or(|end| end > info.size) {
            return Err(invalid("an access outside its region"));
        }
        match if write { info.write } else { info.read } {
            true => Ok(()),
            false => Err(invalid("an access the region does not allow")),
        }
    }
}

fn last_address(first: u64, size: u64) -> Option<u64> {
    first.checked_add(size.checked_sub(1)?)
}

fn argsz<T>() -> u32 {
    size_of::<T>() as u32
}

/// `argsz` must leave room for the structure; more room is fine.
fn check_argsz<T>(given: u32) -> Result<(), Refused> {
    if given < argsz::<T>() {
        return Err(invalid("argsz is smaller than the structure"));
    }
    Ok(())
}

fn bits(flags: &[(bool, u32)]) -> u32 {
    flags.iter().filter(|(set, _)| *set).fold(0, |bits, (_, bit)| bits | bit)
}
