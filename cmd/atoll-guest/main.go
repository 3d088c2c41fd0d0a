// Command atoll-guest is the agent inside every Atoll sandbox: it runs commands,
// moves files and answers for the sandbox's health, over E2B's envd protocol.
//
// Usage:
//
//	atoll-guest [-listen ADDRESS] [-machine] [-groups FD,FD] [-v]
//	atoll-guest -version
//
// It runs as a child of anything or as PID 1. SIGTERM and SIGINT end it with
// all processes that it started, as POST /shutdown does. As PID 1 it changes the
// host name when /init says so; with -machine, as the first process of a machine
// of its own, it also mounts /proc, /sys, /dev and what belongs to them, sets
// the clock when /init says so, and switches the machine off at the end. With
// -boot it is the first process of an initramfs besides, and goes over to the
// root on the machine's disks first.
package main

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/guest/serial"
	"github.com/atoll-run/atoll/guest/server"
	"github.com/atoll-run/atoll/guest/wire"
)

func main() {
	listen := flag.String("listen", "tcp:49983", "where to listen: tcp:[HOST:]PORT, unix:PATH, fd:NUMBER (a listening socket) or serial:NAME (a virtio-serial port)")
	machine := flag.Bool("machine", false, "be the first process of a machine: mount /proc and the like, set the clock, switch off at the end")
	groups := flag.String("groups", "", "descriptors, separated by commas, of control group files (tasks or cgroup.threads) that the processes join and the agent does not")
	initramfs := flag.Bool("boot", false, "be the first process of an initramfs: load its modules, go over to the disks, then -machine")
	verbose := flag.Bool("v", false, "log more")
	version := flag.Bool("version", false, "print the version of the protocol and exit")
	flag.Parse()
	if *version {
		fmt.Println(wire.Version)
		return
	}
	level := slog.LevelWarn
	if *verbose {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	*machine = *machine || *initramfs
	err := run(*listen, *groups, *initramfs, *machine, log)
	if err != nil {
		log.Error("atoll-guest", "error", err)
	}
	if *machine {
		unix.Sync()
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF) // fails in a container
	}
	if err != nil {
		os.Exit(1)
	}
}

// reopenLimit bounds how often in a row a listener that fails is opened again.
const reopenLimit = 20

func run(address, groups string, initramfs, machine bool, log *slog.Logger) error {
	joined, err := inherited(groups)
	if err != nil {
		return err
	}
	cfg := server.Config{Log: log, PID1: os.Getpid() == 1, Machine: machine, Groups: joined}
	if initramfs {
		upper, err := boot()
		if err != nil {
			return err
		}
		cfg.Changes = changes(upper)
	}
	if machine {
		if err := mountAll(); err != nil {
			return err
		}
		threads, pidsMax, err := processGroup()
		if err != nil {
			return err
		}
		if threads != nil {
			cfg.Groups, cfg.PidsMax = append(cfg.Groups, threads), pidsMax
		}
	}
	syscall.Umask(0o022)
	if os.Getpid() != 1 {
		// Orphans of our processes come to us rather than to the init outside.
		_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
	}
	reserveThreads()
	s := server.New(cfg)
	serve, err := listenOn(s, address, log)
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	failed := make(chan error, 1)
	go func() { failed <- serve() }()
	select {
	case err := <-failed:
		return err
	case <-s.Stopped():
	case <-signals:
		s.Terminate(5 * time.Second)
	}
	return nil
}

// inherited takes over descriptors that we were started with.
func inherited(list string) (files []*os.File, err error) {
	if list == "" {
		return nil, nil
	}
	for number := range strings.SplitSeq(list, ",") {
		fd, err := strconv.ParseUint(number, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("-groups %q: not a number", number)
		}
		unix.CloseOnExec(int(fd))
		files = append(files, os.NewFile(uintptr(fd), "group "+number))
	}
	return files, nil
}

// listenOn opens the address and returns what answers there for ever.
func listenOn(s *server.Server, address string, log *slog.Logger) (serve func() error, err error) {
	if name, ok := strings.CutPrefix(address, "serial:"); ok {
		port, err := openSerial(name)
		if err != nil {
			return nil, err
		}
		return func() error { return s.ServeSerial(port, port.Rest) }, nil
	}
	l, err := open(address)
	return func() error { return accept(s, l, address, log) }, err
}

// openSerial opens a serial port, which appears some time after its driver.
func openSerial(name string) (*serial.Port, error) {
	for deadline := time.Now().Add(deviceWait); ; time.Sleep(time.Millisecond) {
		port, err := serial.OpenPort(name)
		if err == nil || !errors.Is(err, os.ErrNotExist) || time.Now().After(deadline) {
			return port, err
		}
	}
}

// accept answers for ever. A restore may leave a listener that no longer
// accepts; then it is opened anew.
func accept(s *server.Server, l net.Listener, address string, log *slog.Logger) error {
	for failures := 0; ; {
		began := time.Now()
		err := s.Serve(l)
		l.Close()
		if time.Since(began) > time.Minute {
			failures = 0
		}
		for {
			if failures++; failures > reopenLimit {
				return fmt.Errorf("listen on %s: %w", address, err)
			}
			log.Warn("listening again", "address", address, "error", err)
			time.Sleep(50 * time.Millisecond)
			if l, err = open(address); err == nil {
				break
			}
		}
	}
}

// open opens a listener described as in the flag -listen.
func open(address string) (net.Listener, error) {
	kind, rest, _ := strings.Cut(address, ":")
	switch kind {
	case "tcp":
		if !strings.Contains(rest, ":") {
			rest = ":" + rest
		}
		return net.Listen("tcp", rest)
	case "unix":
		// A socket that a killed agent left behind is in the way.
		if info, err := os.Lstat(rest); err == nil && info.Mode()&os.ModeSocket != 0 {
			_ = os.Remove(rest)
		}
		return net.Listen("unix", rest)
	case "fd":
		fd, err := strconv.ParseUint(rest, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("listen on %q: not a number", address)
		}
		f := os.NewFile(uintptr(fd), address)
		if f == nil {
			return nil, fmt.Errorf("listen on %q: not an open file", address)
		}
		defer unix.CloseOnExec(int(fd)) // stays open for listening again, but not for our children
		return net.FileListener(f)
	}
	return nil, errors.New("listen address must be tcp:[HOST:]PORT, unix:PATH, fd:NUMBER or serial:NAME")
}
