package qemu

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/runtime/cgroup"
	"github.com/atoll-run/atoll/runtime/process"
)

// nobody is the host user as whom QEMU runs.
const nobody = 65534

// spawn starts QEMU where it can do little: as nobody, in namespaces of its own,
// in the group, under rules that it can never shed. files become the descriptors
// from 3 on. kvm is the group that may use /dev/kvm, 0 for none. own says that the
// guest's memory is nobody else's.
func spawn(group *cgroup.Group, program string, args []string, files []*os.File, stderr *os.File, kvm int, own bool) (p *process.Process, err error) {
	cmd := exec.Command(program, args...)
	cmd.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C", "MALLOC_ARENA_MAX=1"} // its threads need no heap each
	cmd.Dir = "/"
	cmd.ExtraFiles = files
	cmd.Stdout, cmd.Stderr = stderr, stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true, // no signals from our terminal
		Cloneflags: unix.CLONE_NEWIPC | unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWPID | unix.CLONE_NEWNET,
		Credential: &syscall.Credential{Uid: nobody, Gid: nobody},
	}
	if kvm > 0 {
		cmd.SysProcAttr.Credential.Groups = []uint32{uint32(kvm)}
	}
	done, err := smallPages()
	if err != nil {
		return nil, err
	}
	defer done()
	err = group.Run(func(groupFD int) error {
		if groupFD >= 0 {
			cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, groupFD
		}
		// What is set on this thread, which ends with Run, the new process inherits.
		err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
		if !own {
			err = errors.Join(err, keepMemory())
		}
		if err != nil {
			return fmt.Errorf("confine QEMU: %w", err)
		}
		p, err = process.Start(cmd)
		return err
	})
	return p, err
}

// hugePages counts the processes that are being started without huge pages, which
// is a property of the whole process that starts them.
var hugePages struct {
	sync.Mutex
	spurned int
}

// smallPages makes what is started until done is called do without transparent huge
// pages: a monitor touches little here and there, and would take 2 MiB each time.
// This process does without them, too, for the milliseconds that it takes.
func smallPages() (done func(), err error) {
	set := func(change int) error {
		hugePages.Lock()
		defer hugePages.Unlock()
		hugePages.spurned += change
		if hugePages.spurned > 0 {
			return unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0)
		}
		return unix.Prctl(unix.PR_SET_THP_DISABLE, 0, 0, 0, 0)
	}
	if err := set(1); err != nil {
		return nil, fmt.Errorf("do without huge pages: %w", errors.Join(err, set(-1)))
	}
	return func() { _ = set(-1) }, nil
}

// keepMemory sets, on the calling thread and for what it starts, that fallocate
// punches no holes: it does nothing and succeeds; and that it does nothing else:
// it answers that it is not supported.
//
// QEMU gives memory that the guest does not need back to the host in two steps: it
// punches a hole into the file, then it drops its own copy of the pages. The file
// is the template that other machines share. It is sealed, so that the first step
// fails; but then QEMU leaves out the second, and nothing is given back.
//
// QEMU also calls fallocate for disks. A hole that is not punched wastes room, no
// more. To write zeros it punches and then allocates, and believes in neither
// unless both succeed, so that it writes them out.
//
// QEMU also asks for huge pages in the guest's memory, which cannot be: the pages are
// a file's, or copies of those. But the kernel would read 2 MiB of that file around
// each page that is touched, where a pager serves it. That call does nothing, either.
func keepMemory() error {
	const punch = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	const arch, nr, mode, advice = 4, 0, 16 + 8, 16 + 2*8 // offsets in struct seccomp_data; the second and third arguments
	load := func(offset uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
	}
	unless := func(value uint32, skip uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: value, Jf: skip}
	}
	answer := func(value uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: value}
	}
	filter := []unix.SockFilter{
		load(arch), unless(unix.AUDIT_ARCH_X86_64, 10),
		load(nr), unless(unix.SYS_FALLOCATE, 4),
		load(mode), unless(punch, 1),
		answer(unix.SECCOMP_RET_ERRNO), // error 0: success
		answer(unix.SECCOMP_RET_ERRNO | uint32(unix.EOPNOTSUPP)),
		unless(unix.SYS_MADVISE, 3),
		load(advice), unless(unix.MADV_HUGEPAGE, 1),
		answer(unix.SECCOMP_RET_ERRNO),
		answer(unix.SECCOMP_RET_ALLOW),
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	return unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0)
}

// output is a file in memory for what QEMU says, of which the first bytes are kept.
func output() (*os.File, error) {
	const size = 8 << 10
	fd, err := unix.MemfdCreate("output", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "output")
	if err = f.Truncate(size); err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
