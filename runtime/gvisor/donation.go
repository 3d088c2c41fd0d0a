package gvisor

import (
	"fmt"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

// donation is the files that a child process gets, each under a flag that tells
// it the descriptor's number. It owns them.
type donation struct {
	gifts []gift
}

type gift struct {
	flag string
	file *os.File
}

// give hands over one file.
func (d *donation) give(flag string, f *os.File) { d.gifts = append(d.gifts, gift{flag, f}) }

// open hands over a file by its path.
func (d *donation) open(flag, path string, mode int) error {
	f, err := os.OpenFile(path, mode, 0)
	if err != nil {
		return err
	}
	d.give(flag, f)
	return nil
}

// dup hands over a second descriptor of f.
func (d *donation) dup(flag string, f *os.File) error {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	d.give(flag, os.NewFile(uintptr(fd), f.Name()))
	return nil
}

// before passes the files of one flag now; transfer passes the rest. gVisor
// wants some flags in front of its command and some behind it.
func (d *donation) before(cmd *exec.Cmd, flag string) {
	for _, g := range d.gifts {
		if g.flag == flag {
			d.pass(cmd, g)
		}
	}
}

// transfer passes all files that cmd does not have yet.
func (d *donation) transfer(cmd *exec.Cmd) {
	have := make(map[*os.File]bool)
	for _, f := range cmd.ExtraFiles {
		have[f] = true
	}
	for _, g := range d.gifts {
		if !have[g.file] {
			d.pass(cmd, g)
		}
	}
}

func (d *donation) pass(cmd *exec.Cmd, g gift) {
	cmd.ExtraFiles = append(cmd.ExtraFiles, g.file)
	cmd.Args = append(cmd.Args, fmt.Sprintf("--%s=%d", g.flag, 2+len(cmd.ExtraFiles)))
}

// close closes our descriptors of the files.
func (d *donation) close() {
	for _, g := range d.gifts {
		g.file.Close()
	}
	d.gifts = nil
}

// memFile returns a file in memory that holds content and can never grow beyond size bytes.
func memFile(name string, content []byte, size int) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	err = f.Truncate(int64(size))
	if err == nil {
		_, err = f.WriteAt(content, 0)
	}
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// socketPair returns two connected stream sockets.
func socketPair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "socket"), os.NewFile(uintptr(fds[1]), "socket"), nil
}

// joinByPair gives a and b an end each of a pair of connected sockets.
func joinByPair(a *donation, aFlag string, b *donation, bFlag string) error {
	x, y, err := socketPair()
	if err != nil {
		return err
	}
	a.give(aFlag, x)
	b.give(bFlag, y)
	return nil
}
