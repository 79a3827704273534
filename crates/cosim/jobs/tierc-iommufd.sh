# Tier C: user-space drivers on iommufd, through vfio-pci for the PCI functions and vfio-platform for a DMA channel
# (which has no reset driver: vfio_platform.reset_required=0 on the command line).
. /overlay/common.sh

kernel_log boot
for function in 0000:00:02.0 0000:00:03.0; do
    bind_override $function vfio-pci || mark "bind-$function" fail
    dmesg -c > /dev/null
    iommufd-testdev -n 50 $function
    expect "iommufd-$function" $? 0
    kernel_log "$function"
done
channel=$(nth "$last")
bind_override "$channel" vfio-platform || mark bind-channel fail
dmesg -c > /dev/null
iommufd-zdma -n 50 "$channel"
expect iommufd-channel $? 0
kernel_log channel
