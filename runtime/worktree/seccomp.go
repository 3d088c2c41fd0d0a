package worktree

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// denied are the system calls that a sandbox gets EPERM for: they change the
// kernel or the view of it, look into other processes, or have been the way to
// most escapes.
var denied = []uint32{
	unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_FSOPEN, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT,
	unix.SYS_FSPICK, unix.SYS_MOVE_MOUNT, unix.SYS_OPEN_TREE, unix.SYS_MOUNT_SETATTR, unix.SYS_CHROOT,
	unix.SYS_UNSHARE, unix.SYS_SETNS, unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_NAME_TO_HANDLE_AT,
	unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PIDFD_GETFD, unix.SYS_KCMP,
	unix.SYS_KEXEC_LOAD, unix.SYS_KEXEC_FILE_LOAD, unix.SYS_REBOOT, unix.SYS_SWAPON, unix.SYS_SWAPOFF,
	unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE,
	unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD, unix.SYS_FANOTIFY_INIT,
	unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER,
	unix.SYS_KEYCTL, unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY,
	unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_ADJTIMEX, unix.SYS_CLOCK_ADJTIME,
	unix.SYS_ACCT, unix.SYS_QUOTACTL, unix.SYS_SYSLOG, unix.SYS_VHANGUP, unix.SYS_LOOKUP_DCOOKIE, unix.SYS_NFSSERVCTL,
}

// Offsets in what a filter sees of a call (struct seccomp_data), in bytes.
const (
	dataNumber = 0
	dataArch   = 4
	dataArg0   = 16 // low half of the first argument, on the little-endian machines that we support
	dataArg1   = 24
)

// Instructions of classic BPF.
const (
	loadWord  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	jumpEqual = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	jumpAtMin = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
	jumpSet   = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
	ret       = unix.BPF_RET | unix.BPF_K
)

const (
	errno       = unix.SECCOMP_RET_ERRNO
	x32Bit      = 0x40000000 // marks the calls of the x32 ABI, which are none of those that we know
	newUser     = unix.CLONE_NEWUSER
	tiocsti     = 0x5412 // types into somebody else's terminal
	filterEPERM = errno | uint32(unix.EPERM)
)

// filter builds the program for an architecture as the kernel names it.
func filter(arch uint32) []unix.SockFilter {
	stmt := func(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, K: k} }
	// unless jumps over the next instruction when the condition does not hold.
	unless := func(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, Jf: 1, K: k} }
	p := []unix.SockFilter{
		stmt(loadWord, dataArch),
		{Code: jumpEqual, Jt: 1, K: arch},
		stmt(ret, unix.SECCOMP_RET_KILL_PROCESS),
		stmt(loadWord, dataNumber),
	}
	if arch == unix.AUDIT_ARCH_X86_64 {
		p = append(p, unless(jumpAtMin, x32Bit), stmt(ret, unix.SECCOMP_RET_KILL_PROCESS))
	}
	for _, number := range denied {
		p = append(p, unless(jumpEqual, number), stmt(ret, filterEPERM))
	}
	// clone3 has its flags in memory, where a filter cannot look: without it,
	// libraries use clone.
	p = append(p, unless(jumpEqual, unix.SYS_CLONE3), stmt(ret, errno|uint32(unix.ENOSYS)))
	// A new user namespace would give back all capabilities.
	p = append(p,
		unix.SockFilter{Code: jumpEqual, Jf: 3, K: unix.SYS_CLONE},
		stmt(loadWord, dataArg0), unless(jumpSet, newUser), stmt(ret, filterEPERM),
		stmt(loadWord, dataNumber),
		unix.SockFilter{Code: jumpEqual, Jf: 3, K: unix.SYS_IOCTL},
		stmt(loadWord, dataArg1), unless(jumpEqual, tiocsti), stmt(ret, filterEPERM),
	)
	return append(p, stmt(ret, unix.SECCOMP_RET_ALLOW))
}

// auditArch is the running architecture as the kernel names it.
func auditArch() (uint32, bool) {
	switch runtime.GOARCH {
	case "amd64":
		return unix.AUDIT_ARCH_X86_64, true
	case "arm64":
		return unix.AUDIT_ARCH_AARCH64, true
	}
	return 0, false
}

// denySyscalls puts the filter on this thread and all that come of it.
func denySyscalls() error {
	arch, ok := auditArch()
	if !ok {
		return fmt.Errorf("no system call filter for %s", runtime.GOARCH)
	}
	p := filter(arch)
	prog := unix.SockFprog{Len: uint16(len(p)), Filter: &p[0]}
	const setModeFilter = 1
	_, _, e := unix.RawSyscall(unix.SYS_SECCOMP, setModeFilter, 0, uintptr(unsafe.Pointer(&prog)))
	if e != 0 {
		return e
	}
	return nil
}
