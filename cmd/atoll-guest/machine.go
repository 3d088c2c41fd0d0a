package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// mountAll mounts what the first process of a machine has to. What is mounted
// already stays.
func mountAll() error {
	const safe = unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV
	for _, m := range []struct {
		kind, target string
		flags        uintptr
		options      string
		optional     bool // the kernel may lack it
	}{
		{"proc", "/proc", safe, "", false},
		{"sysfs", "/sys", safe, "", false},
		{"devtmpfs", "/dev", unix.MS_NOSUID, "mode=755", false},
		{"devpts", "/dev/pts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=620,ptmxmode=666", false},
		{"tmpfs", "/dev/shm", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777", false},
		{"tmpfs", "/run", unix.MS_NOSUID | unix.MS_NODEV, "mode=755", false},
		{"cgroup2", "/sys/fs/cgroup", safe, "", true},
	} {
		if mounted(m.target) {
			continue
		}
		if err := os.MkdirAll(m.target, 0o755); err != nil && !m.optional {
			return err
		}
		if err := unix.Mount(m.kind, m.target, m.kind, m.flags, m.options); err != nil && !m.optional && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	for link, target := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0",
		"/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2", "/dev/ptmx": "pts/ptmx",
	} {
		// devtmpfs has some of them; those are as good.
		if err := os.Symlink(target, link); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return loopbackUp()
}

// processGroup makes the control group of all processes that the agent starts, so
// that their number can be bounded and the agent go on when it is reached. It
// returns none where the kernel has no such groups. It is of the kind that can
// hold single threads: the agent's that starts processes is in it.
func processGroup() (threads, pidsMax *os.File, err error) {
	const root = "/sys/fs/cgroup"
	const dir = root + "/processes"
	err = os.WriteFile(root+"/cgroup.subtree_control", []byte("+pids"), 0)
	if err != nil {
		return nil, nil, nil
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, nil, err
	}
	if err := os.WriteFile(dir+"/cgroup.type", []byte("threaded"), 0); err != nil {
		return nil, nil, err
	}
	if threads, err = os.OpenFile(dir+"/cgroup.threads", os.O_WRONLY, 0); err != nil {
		return nil, nil, err
	}
	pidsMax, err = os.OpenFile(dir+"/pids.max", os.O_WRONLY, 0)
	return threads, pidsMax, err
}

// mounted reports whether target is a mount point already, by its device number
// differing from its parent's.
func mounted(target string) bool {
	var dir, parent unix.Stat_t
	if unix.Stat(target, &dir) != nil || unix.Stat(target+"/..", &parent) != nil {
		return false
	}
	return dir.Dev != parent.Dev
}

// loopbackUp brings the loopback interface up.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, ifr); err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	ifr.SetUint16(ifr.Uint16() | unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	return nil
}

// spareThreads is how many threads are started in advance.
const spareThreads = 12

// reserveThreads makes Go start threads now that it keeps for later. The
// runtime dies when it cannot start one, which is what a sandbox whose processes
// have used up all PIDs would do to us.
func reserveThreads() {
	var ready, done sync.WaitGroup
	ready.Add(spareThreads)
	for range spareThreads {
		done.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			ready.Done()
			// A system call that blocks holds its thread until all have one.
			ts := unix.NsecToTimespec(int64(2 * time.Millisecond))
			ready.Wait()
			_ = unix.Nanosleep(&ts, nil)
		})
	}
	done.Wait()
}
