package sentry

import (
	"syscall"
	"unsafe" // for seccomp

	"golang.org/x/sys/unix"
)

// keepCPUID lets the guest execute the CPUID instruction itself. gVisor makes it
// fault where the processor can, and answers in its place, which takes five
// times as long; the C library asks seventy times in the start of every program.
//
// What the guest learns is what it learns on processors where CPUID cannot be
// made to fault: which processor this is. It gains no feature, as none depends on
// being announced.
//
// gVisor has no setting for it, so the kernel is told to refuse the request. It
// must be called before any other filter is in force, by a process that may
// install filters, and holds for all threads and children. Where that fails,
// CPUID faults as ever.
func keepCPUID() {
	const (
		setCPUID = 0x1012 // ARCH_SET_CPUID
		number   = 0      // offset of seccomp_data.nr
		arg0     = 16     // offset of the low half of seccomp_data.args[0]
	)
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: number},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_ARCH_PRCTL, Jf: 3},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: arg0},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: setCPUID, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.ENODEV)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, _ = syscall.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC,
		uintptr(unsafe.Pointer(&program)))
}
