package network

import (
	"context"
	"errors"
	"io/fs"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// prewarm keeps n.ready full until ctx ends.
func (n *Network) prewarm(ctx context.Context) {
	for ctx.Err() == nil {
		b, err := n.links.create(n.mtu())
		if err != nil {
			n.log.Warn("cannot prepare a network link", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(tendEvery):
			}
			continue
		}
		select {
		case n.ready <- b:
		case <-ctx.Done():
			if err := n.links.remove(b); err != nil {
				n.log.Warn("cannot remove a network link", "device", b.device(), "err", err)
			}
		}
	}
}

// tendForwarding follows the host when its routes or its own settings change.
func (n *Network) tendForwarding() error {
	_, changed, err := toward(anyInternet)
	if err != nil {
		return err
	}
	if changed { // the host's own switch sets that of every device
		links, err := n.links.list()
		if err != nil {
			return err
		}
		for b := range links {
			if err := setSysctl("ipv4/conf/"+b.device()+"/forwarding", "1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return n.closeDevices()
}

// closeDevices tells the firewall which devices forward to sandboxes only.
func (n *Network) closeDevices() error {
	closed, err := closedDevices()
	if err != nil {
		return err
	}
	return n.firewall.setClosed(closed)
}

// tend keeps the kernel as it should be, whatever other software does to it.
func (n *Network) tend(ctx context.Context) {
	tick := time.NewTicker(tendEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		repaired, err := n.firewall.repair()
		if repaired {
			n.log.Warn("the firewall table was gone and has been written again", "table", n.firewall.name())
		}
		if err == nil {
			err = n.tendForwarding()
		}
		if err != nil {
			n.log.Error("cannot keep the firewall in place", "err", err)
		}
	}
}

// mtu is that of the device that leads to the internet, so that sandboxes need
// not discover it.
func (n *Network) mtu() int {
	if device, _, err := toward(anyInternet); err == nil && device != nil {
		return max(device.Attrs().MTU, 576)
	}
	return defaultMTU
}

// openRoutes switches forwarding on toward the addresses that a policy names;
// for the internet start and tend have done it.
func (n *Network) openRoutes(policy sandbox.NetworkPolicy) error {
	opened := false
	for _, entry := range policy.AllowOut {
		if p, ok := parsePrefix(entry); ok && p.Bits() > 0 {
			_, changed, err := toward(p.Addr())
			if err != nil {
				return err
			}
			opened = opened || changed
		}
	}
	if !opened {
		return nil
	}
	return n.closeDevices()
}
