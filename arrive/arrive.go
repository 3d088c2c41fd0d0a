// Package arrive lets files be used while they still come from elsewhere.
//
// A directory whose files are still on their way has a pipe in it. Whoever needs a part of a file writes to it which one;
// whoever brings the files reads that, and brings those parts first: before all those that somebody waits for, then those that
// somebody will need. A part that is not there yet reads as zeros: readers know
// by sums of their own what is there. A file that is on its way has the sticky bit, under all of its names. When it will never be
// whole, it is cut to nothing.
package arrive

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// PieceSize is the unit in which files are brought, in bytes.
const PieceSize = 64 << 10

const (
	pipeName = ".wants"
	// wantSize is the size of a message in bytes: little enough that the kernel writes it whole.
	wantSize = 128
	// wantHead is what comes before the name in it: the offset, the length of the name, and whether it is ahead of need.
	wantHead = 10
	// pipeSize bounds what waits in a pipe, in bytes; what comes then is lost, and said again by whoever still needs it.
	pipeSize = 1 << 20
)

// Want is a part of a file that is needed.
type Want struct {
	File   string // its name
	Offset int64  // of a byte in it
	Ahead  bool   // nobody waits for it yet
}

// Open returns the pipe of a directory, to be told what is needed; nil when no file of it is on its way.
func Open(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, pipeName), os.O_RDWR|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0) // for both: it does not wait for a reader
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if info, err := f.Stat(); err != nil || info.Mode().Type() != fs.ModeNamedPipe {
		return nil, errors.Join(err, f.Close(), fmt.Errorf("%s is no pipe", f.Name()))
	}
	return f, nil
}

// Ask says what is needed. It never waits: what does not fit is lost.
func Ask(pipe *os.File, w Want) {
	var b [wantSize]byte
	if len(w.File) > wantSize-wantHead {
		return
	}
	binary.LittleEndian.PutUint64(b[:], uint64(w.Offset))
	b[8] = byte(len(w.File))
	if w.Ahead {
		b[9] = 1
	}
	copy(b[wantHead:], w.File)
	raw, err := pipe.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Write(func(fd uintptr) bool {
		_, _ = unix.Write(int(fd), b[:])
		return true
	})
}

// Wants are what is asked for, for whoever brings the files.
type Wants struct{ pipe *os.File }

// Make makes the pipe of a directory. From then on its files count as being on their way, until Remove.
func Make(dir string) (*Wants, error) {
	if err := unix.Mkfifo(filepath.Join(dir, pipeName), 0o600); err != nil {
		return nil, fmt.Errorf("make a pipe in %s: %w", dir, err)
	}
	f, err := Open(dir)
	if err != nil {
		return nil, err
	}
	raw, err := f.SyscallConn()
	if err == nil { // a smaller pipe serves as well
		err = raw.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeSize) })
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &Wants{f}, nil
}

// Next waits for the next want. It fails once the pipe is closed.
func (w *Wants) Next() (Want, error) {
	var b [wantSize]byte
	if _, err := io.ReadFull(w.pipe, b[:]); err != nil {
		return Want{}, err
	}
	return parse(b), nil
}

// parse reads a message, which whoever can open the pipe may have written.
func parse(b [wantSize]byte) Want {
	n := min(int(b[8]), wantSize-wantHead)
	return Want{File: string(b[wantHead : wantHead+n]), Offset: int64(binary.LittleEndian.Uint64(b[:])), Ahead: b[9] != 0}
}

// Create makes a file that is on its way, of size bytes.
func Create(path string, size int64) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(f.Truncate(size), f.Chmod(0o600|fs.ModeSticky)); err != nil {
		return nil, errors.Join(err, f.Close(), os.Remove(path))
	}
	return f, nil
}

// Finish says that all of a file is there.
func Finish(f *os.File) error { return errors.Join(f.Sync(), f.Chmod(0o600)) }

// GiveUp says that the rest of a file will never come.
func GiveUp(f *os.File) error { return f.Truncate(0) }

// Late reports whether a file is on its way, or was and never will be whole.
func Late(path string) (bool, error) {
	info, err := os.Lstat(path)
	return err == nil && info.Mode()&fs.ModeSticky != 0, err
}

// Remove ends it: all files are there, or never will be.
func (w *Wants) Remove() error {
	return errors.Join(os.Remove(w.pipe.Name()), w.pipe.Close())
}
