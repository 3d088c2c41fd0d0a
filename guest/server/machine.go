package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/guest/wire"
)

// This file answers the calls that only the maker of the machine can make, on
// serial.MachinePort. They need no token, which the runtime does not know.
//
//	POST /machine         wire.Machine; 204 when all is done
//	GET  /changes         what was written to the root, as an OCI layer

// ChangesFunc writes what was changed in the root as an OCI layer.
type ChangesFunc func(ctx context.Context, w io.Writer) error

func (s *Server) machineHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /machine", s.machine)
	mux.HandleFunc("GET /changes", s.changes)
	return mux
}

func (s *Server) machine(w http.ResponseWriter, r *http.Request) {
	var in wire.Machine
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&in); err != nil {
		writeError(w, http.StatusBadRequest, "the body is not valid JSON: "+err.Error())
		return
	}
	if in.Hostname != "" && !validHostname(in.Hostname) || len(in.Entropy) > maxEntropy {
		writeError(w, http.StatusBadRequest, "hostname or entropy out of bounds")
		return
	}
	if err := identify(in); err != nil {
		writeError(w, statusOf(err), err.Error())
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// identify makes the machine what in says. The random numbers come first: what
// follows may use them.
func identify(in wire.Machine) error {
	var errs []error
	if len(in.Entropy) > 0 {
		errs = append(errs, addEntropy(in.Entropy))
	}
	if in.Time != nil {
		errs = append(errs, setClock(*in.Time))
	}
	if in.Hostname != "" {
		errs = append(errs, setHostname(in.Hostname))
	}
	if in.Network != nil {
		errs = append(errs, configure(*in.Network))
	}
	return errors.Join(errs...)
}

// interfaceName is the name that the kernel gives the first network device.
const interfaceName = "eth0"

// configure gives the interface its address, in place of all that it had.
func configure(n wire.MachineNetwork) error {
	dev, err := netlink.LinkByName(interfaceName)
	if err != nil {
		return fmt.Errorf("%s: %w", interfaceName, err)
	}
	// Going down forgets routes, neighbours and connections' ways of the past.
	if err := netlink.LinkSetDown(dev); err != nil {
		return fmt.Errorf("take %s down: %w", interfaceName, err)
	}
	if n.MAC != "" {
		mac, err := net.ParseMAC(n.MAC)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetHardwareAddr(dev, mac); err != nil {
			return fmt.Errorf("set %s's MAC address: %w", interfaceName, err)
		}
	}
	if n.MTU != 0 {
		if err := netlink.LinkSetMTU(dev, n.MTU); err != nil {
			return fmt.Errorf("set %s's MTU: %w", interfaceName, err)
		}
	}
	if err := readdress(dev, n); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(dev); err != nil {
		return fmt.Errorf("bring %s up: %w", interfaceName, err)
	}
	if n.Gateway.IsValid() {
		route := &netlink.Route{LinkIndex: dev.Attrs().Index, Gw: n.Gateway.AsSlice()}
		if err := netlink.RouteReplace(route); err != nil {
			return fmt.Errorf("route by %s: %w", n.Gateway, err)
		}
	}
	if n.Resolver.IsValid() {
		return replaceFile("/etc/resolv.conf", fmt.Sprintf("nameserver %s\n", n.Resolver))
	}
	return nil
}

// readdress replaces the addresses of dev.
func readdress(dev netlink.Link, n wire.MachineNetwork) error {
	want := &netlink.Addr{IPNet: &net.IPNet{
		IP:   n.Address.Addr().AsSlice(),
		Mask: net.CIDRMask(n.Address.Bits(), n.Address.Addr().BitLen()),
	}}
	have, err := netlink.AddrList(dev, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	stays := func(a netlink.Addr) bool { return a.Equal(*want) }
	for _, a := range slices.DeleteFunc(slices.Clone(have), stays) {
		if err := netlink.AddrDel(dev, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove address %s: %w", a.IPNet, err)
		}
	}
	if slices.ContainsFunc(have, stays) {
		return nil
	}
	if err := netlink.AddrAdd(dev, want); err != nil {
		return fmt.Errorf("add address %s: %w", n.Address, err)
	}
	return nil
}

// replaceFile writes a file. A link of that name may lead nowhere, as on systems
// with a resolver of their own, and is replaced.
func replaceFile(name, text string) error {
	if info, err := os.Lstat(name); err == nil && !info.Mode().IsRegular() {
		if err := os.Remove(name); err != nil {
			return err
		}
	}
	return os.WriteFile(name, []byte(text), 0o644)
}

// changes answers GET /changes.
func (s *Server) changes(w http.ResponseWriter, r *http.Request) {
	if s.Changes == nil {
		writeError(w, http.StatusNotFound, "this machine has no overlay")
		return
	}
	w.Header().Set("Content-Type", "application/x-tar")
	if err := s.Changes(r.Context(), w); err != nil {
		s.Log.Warn("changes", "error", err)
		panic(http.ErrAbortHandler) // the stream must not look whole
	}
}
