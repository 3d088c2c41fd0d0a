package network

import (
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
)

// setClosed changes which devices forward to sandboxes only.
func (f *firewall) setClosed(closed []string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if slices.Equal(closed, f.closed) {
		return nil
	}
	b, err := f.begin()
	if err != nil {
		return err
	}
	b.FlushSet(b.closed)
	for _, device := range closed {
		if err := b.SetAddElements(b.closed, []nftables.SetElement{{Key: deviceKey(device)}}); err != nil {
			return err
		}
	}
	return f.commit(b, func() { f.closed = closed })
}

// uninstall removes the table and returns how many other nodes have one.
func (f *firewall) uninstall() (others int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	b, err := f.begin()
	if err != nil {
		return 0, err
	}
	b.AddTable(b.t)
	b.DelTable(b.t)
	if err := b.Flush(); err != nil {
		return 0, err
	}
	tables, err := b.ListTablesOfFamily(nftables.TableFamilyINet)
	for _, t := range tables {
		if strings.HasPrefix(t.Name, tablePrefix) {
			others++
		}
	}
	return others, err
}

// repair writes the table again if it is gone, and reports whether it was:
// other software may flush all of nftables when it restarts.
func (f *firewall) repair() (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	b, err := f.begin()
	if err != nil {
		return false, err
	}
	if there, err := f.installed(b); there || err != nil {
		return false, err
	}
	return true, f.write()
}

// installed reports whether the table exists. f.mu is held.
func (f *firewall) installed(b *table) (bool, error) {
	tables, err := b.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, fmt.Errorf("listing tables: %w", err)
	}
	return slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == b.t.Name }), nil
}

// obstacles names chains of others that drop forwarded packets by default, as
// container engines and desktop firewalls install them: they would stop
// sandboxes however our own rules decide.
func (f *firewall) obstacles() ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	b, err := f.begin()
	if err != nil {
		return nil, err
	}
	chains, err := b.ListChains()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, c := range chains {
		drops := c.Hooknum != nil && *c.Hooknum == *nftables.ChainHookForward && c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop
		if drops && c.Table.Family != nftables.TableFamilyIPv6 && !strings.HasPrefix(c.Table.Name, tablePrefix) {
			out = append(out, c.Table.Name+"/"+c.Name)
		}
	}
	return out, nil
}
